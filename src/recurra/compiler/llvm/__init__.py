"""The backend for CPUs: programs of the loop IR as native code, through LLVM."""
