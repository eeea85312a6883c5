"""What the tests of recordings share."""

from __future__ import annotations

import pytest

from tests.recording.setting import Setting


@pytest.fixture
def setting() -> Setting:
    return Setting()
