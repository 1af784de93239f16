"""Importing this puts rlfast into verl: for ``VERL_USE_EXTERNAL_MODULES`` and ``actor_rollout_ref.model.external_lib``.

Both name a module that verl imports, which asks for the patch. An entry point cannot ask, see ``verl_plugin.py``.
"""

from rlfast.integrations import patch

patched = patch("verl")
