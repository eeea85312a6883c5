"""These tests need an extra."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("lightning") else ["*"]
