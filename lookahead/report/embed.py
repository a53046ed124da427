"""JSON inside HTML."""

from __future__ import annotations

import json
import re
from typing import Any

# What could end the element or its line, has no UTF-8, or can't be seen: controls, joiners, directions.
UNSAFE = re.compile(
    "[<>&\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]"
)


def embedded(value: Any) -> str:
    """Return `value` as JSON that may stand in a `<script>` element, whatever its strings hold.

    >>> embedded("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
