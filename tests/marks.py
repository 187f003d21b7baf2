"""Marks that several tests share."""

from __future__ import annotations

import pytest
import torch

from heeler.rollout.engines.packing import can_pack

needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="there are no packed products here")
