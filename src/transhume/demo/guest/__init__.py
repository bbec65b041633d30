"""The guest that the demo and the tests move: Debian's cloud kernel, busybox and a workload of our own."""
