"""Where a completion goes on with another question of its own."""

from __future__ import annotations

import re

TURN = re.compile(
    r"\n[ \t#*>_]*(?:(?:next )?(?:question|problem)|q|exercise|human|user|instruction|input|example)"
    r"(?: *\d+)?[ *_]*[:.](?=[\s*])|<\|(?:im_start|start_header_id)\|>\s*user",
    re.IGNORECASE,
)
