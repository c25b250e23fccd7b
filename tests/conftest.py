import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, so that a red test is one's own doing; HYPOTHESIS_PROFILE=explore looks
# further.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
