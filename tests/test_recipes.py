"""The recipes of experiments/launch are of their formats, and call the program as it is."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from jaxllm import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'experiments' / 'launch'


def check_call(arguments):
  """Check that `jaxllm.train` takes these arguments with this config."""
  found = dict(re.fullmatch(r'--([\w.]+)(?:=(.*))?', one).groups() for one in arguments)
  assert 'distributed' in found and 'workdir' in found
  config_lib.override(config_lib.load(str(ROOT / found['config'])), {
    name.removeprefix('config.'): value for name, value in found.items()
    if name.startswith('config.')})


@pytest.mark.parametrize('name', ['tpuvm.sh', 'slurm.sh'])
def test_scripts_are_bash(name):
  subprocess.run(['bash', '-n', LAUNCH / name], check=True)


def test_tpu_vms_get_a_python_and_extras_that_exist():
  text = (LAUNCH / 'tpuvm.sh').read_text()
  check_call(shlex.split(re.search(r'ARGUMENTS=\((.*?)\)', text, re.S)[1]))
  setup = (ROOT / 'setup.cfg').read_text()
  for extra in re.search(r'\.\[([\w,]+)\]', text)[1].split(','):
    assert f'\n{extra} =\n' in setup
  assert f'Python :: {re.search("--python (3[.][0-9]+)", text)[1]}\n' in setup


def test_directives_of_sbatch_come_first_and_are_whole():
  text = (LAUNCH / 'slurm.sh').read_text()
  found = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', text, re.M))
  assert len(found) == text.count('#SBATCH')
  assert text.rindex('#SBATCH') < re.search(r'^[^#\n]', text, re.M).start()
  assert found['ntasks-per-node'] == found['gpus-per-node'] and 'requeue' in found
  assert re.fullmatch(r'TERM@\d+', found['signal'])
  call = re.search(r'jaxllm\.train (.*?[^\\])\n', text, re.S)[1]
  check_call(shlex.split(call.replace('\\\n', ' ')))


# The fields that the recipes use: kind -> field -> type, or the schema of what is inside. A list
# of one schema holds any number of such things.
CONTAINER = {
  'name': str, 'image': str, 'args': [str], 'ports': [{'containerPort': int}],
  'env': [{'name': str, 'value': str}], 'volumeMounts': [{'name': str, 'mountPath': str}],
  'resources': {'requests': {'google.com/tpu': int, 'nvidia.com/gpu': int},
                'limits': {'google.com/tpu': int, 'nvidia.com/gpu': int}},
}
POD = {
  'restartPolicy': str, 'serviceAccountName': str, 'terminationGracePeriodSeconds': int,
  'nodeSelector': dict.fromkeys((
    'cloud.google.com/gke-tpu-accelerator', 'cloud.google.com/gke-tpu-topology',
    'cloud.google.com/gke-spot'), str),
  'containers': [CONTAINER], 'volumes': [{'name': str, 'emptyDir': {'medium': str}}],
}
JOB = {
  'parallelism': int, 'completions': int, 'completionMode': str, 'backoffLimit': int,
  'podFailurePolicy': {'rules': [{'action': str, 'onExitCodes': {
    'containerName': str, 'operator': str, 'values': [int]}}]},
  'template': {'spec': POD},
}
JOBSET = {
  'apiVersion': str, 'kind': str, 'metadata': {'name': str, 'annotations': {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': str}},
  'spec': {
    'network': {'enableDNSHostnames': bool, 'publishNotReadyAddresses': bool},
    'failurePolicy': {'maxRestarts': int, 'rules': [
      {'action': str, 'onJobFailureReasons': [str]}]},
    'replicatedJobs': [{'name': str, 'replicas': int, 'template': {'spec': JOB}}],
  },
}


def check(value, schema, path=''):
  if isinstance(schema, dict):
    assert isinstance(value, dict), path
    for key, inner in value.items():
      assert key in schema, f'{path}: there is no field {key!r}'
      check(inner, schema[key], f'{path}.{key}')
  elif isinstance(schema, list):
    assert isinstance(value, list) and value, path
    for index, inner in enumerate(value):
      check(inner, schema[0], f'{path}[{index}]')
  else:
    assert type(value) is schema, f'{path}: {value!r}'


def test_the_jobset_has_the_fields_of_its_kind():
  value = yaml.safe_load((LAUNCH / 'gke.yaml').read_text())
  check(value, JOBSET)
  assert (value['apiVersion'], value['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  replicated, = value['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  # An exit code is asked for, which Kubernetes allows with this alone.
  assert pod['restartPolicy'] == 'Never' and job['completionMode'] == 'Indexed'
  rule, = job['podFailurePolicy']['rules']
  container, = pod['containers']
  assert rule['onExitCodes'] == {
    'containerName': container['name'], 'operator': 'In', 'values': [2]}
  sizes = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  chips = container['resources']['limits']['google.com/tpu'] * job['parallelism']
  assert chips == int(sizes[0]) * int(sizes[1]) * int(sizes[2])
  assert job['completions'] == job['parallelism']
  check_call(container['args'])


def test_the_image_has_what_it_copies_and_trains():
  lines = [line for line in (LAUNCH / 'Dockerfile').read_text().split('\n')
           if line and not line.startswith(('#', ' '))]
  assert {line.split()[0] for line in lines} == {
    'FROM', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'ENTRYPOINT'}
  for line in lines:
    if line.startswith('COPY'):
      assert all((ROOT / name).exists() for name in line.split()[1:-1])
  assert json.loads(lines[-1].partition(' ')[2]) == ['python', '-m', 'jaxllm.train']
