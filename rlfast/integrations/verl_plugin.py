"""The entry point ``verl.plugins``: verl imports it in every process, and it patches where RLFAST_VERL=1 asks for it.

Without that it does nothing: to install rlfast changes no one's training. verl hides what a plug-in raises, so that is
logged here.
"""

from __future__ import annotations

import logging

from rlfast import backends
from rlfast.integrations import patch


def load() -> None:
    """Patch verl if the environment asks for it.

    Raises:
        Exception: what ``rlfast.patch("verl")`` raised, after it was logged.
    """
    if not backends.verl_requested():
        return
    try:
        patch("verl")
    except Exception as error:
        logging.getLogger("rlfast.integrations").error("RLFAST_VERL=1, and verl runs without rlfast: %s", error)
        raise


load()
