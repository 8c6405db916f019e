#!/usr/bin/env python3
# /// script
# [tool.runspec]
# schema = "1"
# name = "steps/rl/pivotrl"
# image = "nemo-pivotrl:0.1.0"
# setup = "nemo_pivotrl is installed in the image: its Dockerfile puts it over nvcr.io/nvidia/nemo-rl."
#
# [tool.runspec.run]
# launch = "torchrun"
# cmd = "python {script} --config {config}"
#
# [tool.runspec.config]
# dir = "./config"
# default = "default"
# format = "omegaconf"
#
# [tool.runspec.resources]
# nodes = 1
# gpus_per_node = 8
# ///
"""PivotRL: trajectories and a policy in, pivots and a better policy out. Usage: step.py [--config FILE] [key=value ...]"""

from pathlib import Path

from nemo_pivotrl.integrations.nemotron_step import main

if __name__ == "__main__":
    main(Path(__file__).parent / "config/default.yaml")
