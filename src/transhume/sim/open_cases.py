"""What the machines do not stand yet, and what the simulator therefore does not do to them.

Each is False until the machines or movers are mended; set to True it makes seeds go wrong, which a test keeps
watching. Nothing else is let through.
"""

from __future__ import annotations

BEGIN_MAY_FAIL_WHILE_OWING = False
"""Whether a successor's first step may fail although pages were left for after the resume.

The machines then do not know that any were: the source frees its RAM, and the destination takes itself for
whole.
"""

ALONE_BEFORE_PAGING_COUNTS = False
"""Whether a source that was lost before the state PAGING, or that a successor has never met, counts as lost.

The machine does not note that: it then never gives up, and does not say that it waits.
"""

RECORD_MAY_END_AMID_PAGING = False
"""Whether the controller may end a committed migration on which nobody has reported for long.

The source takes a record that has ended for the word that no page is missing, and frees its RAM.
"""

LOST_PAGES_MUST_END = False
"""Whether it must end when the source's QEMU and mover have died and nobody has the missing pages any more.

Without `give_up_after_s` both ends wait for ever, and the source does not say that there is nothing to wait
for.
"""
