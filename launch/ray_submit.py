"""Quantizes on a cluster that `ray up` started. This file alone is copied to the head and run there:

    ray submit launch/ray-cluster.yaml launch/ray_submit.py -- MODEL OUTPUT [OPTIONS OF awqdist quantize]

It runs in the home folder of the head, so MODEL, OUTPUT and --calibration are absolute paths, seen by all nodes.
"""

import sys
from pathlib import Path

from awqdist.cli.main import main

if len(sys.argv) < 3 or not Path(sys.argv[2]).is_absolute():
    sys.exit("ray_submit.py: error: give MODEL and then OUTPUT, an absolute path that all nodes see")
sys.argv[1:] = ["quantize", *sys.argv[1:], "--backend", "ray", "--ray-address", "auto"]
main()
