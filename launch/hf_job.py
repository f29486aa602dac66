# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""A run whose memory is a Hub repository: it begins, or goes on from the newest checkpoint there.

    hf jobs uv run --flavor a100-large --timeout 24h --attempts 5 --secrets HF_TOKEN \
        --with "gpt2repro @ git+https://github.com/YOU/gpt2repro" launch/hf_job.py gpt2-124M \
        --config 124M --data stream:HuggingFaceFW/fineweb:sample-10BT

`--with` names where your copy of this project lies. A repository's name alone belongs to the token's account; an
organisation's is written ORGANISATION/NAME. Every kept checkpoint is sent there. Jobs end after 30 minutes unless
--timeout says otherwise, and what was trained since the last checkpoint is lost then: choose --save_steps accordingly.
The words after the repository go to `gpt2repro train`. The same file serves on any machine that comes and goes
(launch/skypilot.yaml).
"""

import os
import sys

try:
    import torch
    from huggingface_hub import HfApi

    import gpt2repro  # noqa: F401
except ImportError as error:
    sys.exit(f"{error}: add --with 'gpt2repro @ git+https://…', which names where your copy of this project lies")


def main(repo: str, *options: str) -> None:
    api = HfApi()
    repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
    branches = [ref.name for ref in api.list_repo_refs(repo).branches] if api.repo_exists(repo) else []
    if any(name.startswith("step-") for name in branches) and not os.path.isdir("runs/job/checkpoints"):
        options += ("--resume", f"hub:{repo}")  # a disk that has survived knows more than the Hub
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(max(1, torch.cuda.device_count()))]
    command = ["-m", *torchrun, "-m", "gpt2repro", "train", "--run_dir", "runs/job", "--push_to_hub", repo, *options]
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected: hf_job.py NAME|OWNER/NAME [options of gpt2repro train]")
    main(*sys.argv[1:])
