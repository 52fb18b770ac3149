# What the emulated extension and the one whose launches run nothing have in common. From CUDA_SOURCES
# it makes the target `translation`, with `kernels` (the sources that are compiled) in `translated`;
# `rest` is the extension without them, and the target `loops` the CPU's loops, which are there once,
# for the dispatch between instruction sets. Options are taken from `options`.
set(csrc ${CMAKE_CURRENT_LIST_DIR}/../../csrc)
set(CUDA_SOURCES ${csrc}/cuda CACHE PATH "what is translated")

set(translated ${CMAKE_CURRENT_BINARY_DIR}/translated)
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CUDA_SOURCES}/*.cu ${CUDA_SOURCES}/*.cuh)
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME)
  set(out ${translated}/${name})
  if(name MATCHES "\\.cu$")
    string(APPEND out .cpp)
    list(APPEND kernels ${out})
  else()
    list(APPEND headers ${out})
  endif()
  add_custom_command(
    OUTPUT ${out}
    COMMAND Python::Interpreter ${CMAKE_CURRENT_LIST_DIR}/translate.py ${source} ${out}
    DEPENDS ${source} ${CMAKE_CURRENT_LIST_DIR}/translate.py)
endforeach()
add_custom_target(translation DEPENDS ${headers} ${kernels})

add_library(loops OBJECT ${csrc}/cpu/loops.cpp)
target_include_directories(loops PRIVATE ${csrc})
target_compile_definitions(loops PRIVATE EIGENFILTER_ISA=baseline)
target_compile_options(loops PRIVATE ${options} -Wno-psabi)

set(bindings module ops isa param_lists tensor_args arguments reader)
list(TRANSFORM bindings PREPEND ${csrc}/bindings/)
set(cpu isa elementwise reduce vectors cross_entropy parallel)
list(TRANSFORM cpu PREPEND ${csrc}/cpu/)
set(rest ${bindings} ${cpu})
list(TRANSFORM rest APPEND .cpp)
