"""Distils a student from larger models, in one of several experiments.

    python -m train.distill --experiment lm --teacher default --text notes.txt --layers 2 --out runs/small
    python -m train.distill --experiment diverse --out runs/digits
    python -m train.distill --experiment recommend --out runs/recommend
    python -m train.distill --experiment transfer --out runs/transfer
    python -m train.distill --experiment sam_clip --out runs/merged
    python -m train.distill --experiment cliptex --out runs/cliptex

`--experiment lm --help` and the like list the options of each. With `--resume` an interrupted run goes on where it was.
"""

import argparse
import sys

from train import (
    distill_cliptex,
    distill_diverse,
    distill_lm,
    distill_recommend,
    distill_sam_clip,
    distill_transfer,
)
from train.command import run

EXPERIMENTS = {
    "lm": (distill_lm.LmDistillConfig, distill_lm.distill, distill_lm.__doc__),
    "diverse": (distill_diverse.DiverseConfig, distill_diverse.distill, distill_diverse.__doc__),
    "cliptex": (distill_cliptex.ClipTexConfig, distill_cliptex.distill, distill_cliptex.__doc__),
    "recommend": (distill_recommend.RecommendConfig, distill_recommend.distill, distill_recommend.__doc__),
    "sam_clip": (distill_sam_clip.SamClipConfig, distill_sam_clip.distill, distill_sam_clip.__doc__),
    "transfer": (distill_transfer.TransferConfig, distill_transfer.distill, distill_transfer.__doc__),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.distill", description=__doc__, add_help=False)
    parser.add_argument("--experiment", choices=sorted(EXPERIMENTS), required=True)
    chosen = parser.parse_known_args(sys.argv[1:])[0].experiment
    config, distill, description = EXPERIMENTS[chosen]
    run(config, distill, prog=f"python -m train.distill --experiment {chosen}", description=description)


if __name__ == "__main__":
    main()
