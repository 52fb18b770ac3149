"""Many runs: each in a process of its own, resumable as a whole."""
