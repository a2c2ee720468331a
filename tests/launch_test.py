"""The launch scripts end in a command line that the runner takes."""

import pathlib
import shutil
import subprocess

import pytest

from experiments import train
from experiments.arguments import parse_args
from experiments.optimizers import METHODS

LAUNCH = pathlib.Path(__file__).parent.parent / 'experiments' / 'launch'
# What stands in for the programs of a cluster; `python` writes down what it was to run.
STANDINS = {
  'python': 'printf "%s\\0" "$@" > "$WORDS"',
  'srun': 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
  'nvidia-smi': 'for i in 0 1 2 3; do echo "GPU $i: a card"; done',
  # The last word is for the shell of the hosts.
  'gcloud': 'echo "$@"; cd /; for last; do :; done; exec bash -c "${last#--command=}"',
}
RUN = ['--preset', 'smoke', '--data.batch_size', '32']
RUN += ['--data.source', 'files', '--data.paths', 'my text.txt,b']
CLUSTER = dict(RUNS='/shared/all runs')
POD = CLUSTER | dict(TPU_NAME='slice', ZONE='zone', CODE=str(LAUNCH.parent.parent))
BATCH = CLUSTER | dict(SLURM_SUBMIT_DIR=str(LAUNCH.parent.parent))
NAMED = CLUSTER | dict(COORDINATOR='host0:8476', PROCESSES='4', PROCESS='3')


def launched(script, root, variables, *words, without=()):
  """(exit code, what it printed, the words given to python)."""
  programs, words_file = root / 'bin', root / 'words'
  programs.mkdir()
  # Nothing else of this machine can be reached, a real gcloud least of all.
  for name in ('bash', 'env', 'dirname', 'wc'):
    (programs / name).symlink_to(shutil.which(name))
  for name, body in STANDINS.items():
    if name not in without:
      (programs / name).write_text(f'#!/usr/bin/env bash\n{body}\n')
      (programs / name).chmod(0o755)
  python = dict(PYTHON=str(programs / 'python'), WORDS=str(words_file))
  done = subprocess.run(
    [str(programs / 'bash'), str(LAUNCH / script), *words],
    env=dict(PATH=str(programs)) | python | variables,
    capture_output=True,
    text=True,
    timeout=30,
  )
  given = words_file.read_text().split('\0')[:-1] if words_file.exists() else []
  return done.returncode, done.stdout + done.stderr, given


@pytest.mark.parametrize('script', sorted(p.name for p in LAUNCH.glob('*.s*')))
def test_scripts_are_bash(script):
  subprocess.run(['bash', '-n', str(LAUNCH / script)], check=True, timeout=30)


@pytest.mark.parametrize(
  ('script', 'variables', 'mesh', 'coordinator', 'resume'),
  [
    ('tpu_pod.sh', POD, ['--mesh.fsdp', '32'], 'auto', False),
    ('slurm.sbatch', BATCH, ['--mesh.fsdp', '32'], 'auto', True),
    ('host.sh', CLUSTER, ['--mesh.fsdp', '32'], 'auto', False),
    ('host.sh', NAMED, ['--mesh.data', '32'], 'host0:8476', False),
    ('gpu_node.sh', {}, [], None, False),
    ('gpu_node.sh', {'GPUS': '2'}, ['--mesh.data', '2'], None, False),
  ],
)
def test_scripts_end_in_a_run(script, variables, mesh, coordinator, resume, tmp_path):
  code, log, words = launched(script, tmp_path, variables, *RUN, *mesh)
  assert code == 0 and words[:2] == ['-m', 'experiments.train'], log
  asked, (experiment,) = parse_args(words[2:], METHODS, command=train.Command)
  assert (asked.coordinator, asked.resume) == (coordinator, resume)
  assert experiment.data.paths == ('my text.txt', 'b')
  m = experiment.mesh
  if script == 'gpu_node.sh':
    assert (m.fsdp, m.data) == ((2, 2) if 'GPUS' in variables else (4, 1))
    return
  assert m.data * m.fsdp == 32 and asked.runs == '/shared/all runs'
  if variables is NAMED:
    assert (asked.processes, asked.process) == (4, 3)
  if script == 'tpu_pod.sh':
    assert log.startswith('compute tpus tpu-vm ssh slice --zone=zone --worker=all')


@pytest.mark.parametrize(
  ('script', 'variables', 'without', 'message'),
  [
    ('tpu_pod.sh', POD | {'TPU_NAME': ''}, [], 'TPU_NAME: name of the TPU slice'),
    ('tpu_pod.sh', POD | {'ZONE': ''}, [], 'ZONE: its zone'),
    ('tpu_pod.sh', POD, ['gcloud'], 'gcloud is not on PATH'),
    ('slurm.sbatch', BATCH | {'RUNS': ''}, [], 'RUNS: a directory that every'),
    ('slurm.sbatch', CLUSTER, [], 'SLURM_SUBMIT_DIR: start it with sbatch'),
    ('host.sh', NAMED | {'PROCESS': ''}, [], 'PROCESS: the number of this one'),
    ('gpu_node.sh', {}, ['nvidia-smi'], 'nvidia-smi is not on PATH'),
    ('gpu_node.sh', {'GPUS': '0'}, [], "GPUS must be a number from 1, got '0'"),
  ],
)
def test_what_is_missing_is_named(script, variables, without, message, tmp_path):
  code, log, words = launched(script, tmp_path, variables, *RUN, without=without)
  assert code == 1 and message in log and not words


def test_a_coordinator_that_cannot_be_is_told_in_one_line(capsys):
  flags = ['--preset', 'smoke', '--coordinator', 'localhost:1']
  for more, message in (
    (['--processes', '2', '--process', '2'], 'process must be from 0 to'),
    (['--heartbeat', '0'], 'heartbeat must be at least 1 second'),
  ):
    assert train.main([*flags, *more]) == 2
    assert message in capsys.readouterr().err
