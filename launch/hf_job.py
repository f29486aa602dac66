# /// script
# requires-python = ">=3.10"
# dependencies = ["gpt2repro @ git+https://github.com/USER/gpt2repro"]
# ///
"""A run whose memory is a Hub repository: it begins, or goes on from the newest checkpoint there.

    hf jobs uv run --flavor a100-large --timeout 24h --attempts 5 --secrets HF_TOKEN launch/hf_job.py USER/NAME \
        --config 124M --data stream:HuggingFaceFW/fineweb:sample-10BT

Every kept checkpoint is sent there. Change the line `dependencies` to where your copy of this project lies. Jobs end
after 30 minutes unless --timeout says otherwise, and what was trained since the last checkpoint is lost then: choose
--save_steps accordingly. The words after USER/NAME go to `gpt2repro train`. The same file serves on any machine that
comes and goes (launch/skypilot.yaml).
"""

import os
import sys

import torch
from huggingface_hub import HfApi


def main(repo: str, *options: str) -> None:
    api = HfApi()
    branches = [ref.name for ref in api.list_repo_refs(repo).branches] if api.repo_exists(repo) else []
    if any(name.startswith("step-") for name in branches) and not os.path.isdir("runs/job/checkpoints"):
        options += ("--resume", f"hub:{repo}")  # a disk that has survived knows more than the Hub
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(max(1, torch.cuda.device_count()))]
    command = ["-m", *torchrun, "-m", "gpt2repro", "train", "--run_dir", "runs/job", "--push_to_hub", repo, *options]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected: hf_job.py USER/NAME [options of gpt2repro train]")
    main(*sys.argv[1:])
