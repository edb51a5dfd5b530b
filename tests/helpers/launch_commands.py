"""Arguments of the launch scripts, and what a script prints with --dry-run."""

from tests.helpers.fake_cluster import ROOT, clean_env, launch

TRAIN = ["--", "--config", "configs/skysense_full.py", "--workdir", "gs://bucket/a run"]
GKE = "--name run1 --image images/skysense:1 --accelerator tpu-v6e-slice --topology 16x16 --hosts 64 --chips 4".split()


def dry(name, *args, **env):
    done = launch(name, args, {**clean_env(), "XDG_CACHE_HOME": "/cache", **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "ROOT")
