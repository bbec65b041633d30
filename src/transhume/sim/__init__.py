"""A farm in one process, from one seed: the product's own state machines among faults that never end well.

A seed decides everything: how long each thing takes, which faults strike when, what the guest does. The
machines are the product's; around them stand models of what they command: a register that answers late or
never, hosts whose daemons and movers are killed, a stream that breaks, QEMU. First safety is demanded while
the faults strike, after every step; then the faults stop, and everything must end (TigerBeetle's VOPR works
in these two phases). `python -m transhume.sim --seeds 1000` runs it.
"""
