"""Recipes are complete and of their format, and a rehearsal says what a preemption costs."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from jaxllm import config as config_lib
from jaxllm.sharding import MeshConfig, mesh_shape
from jaxllm.tools import launch, rehearsal
from tests import programs
from tests.training import tiny_run

ROOT = pathlib.Path(__file__).parents[2]


def printed(target, *flags, config='gpt3.py:1.3b'):
  code, out, error = programs.run('tools.launch', f'--config=experiments/{config}',
                                  f'--for={target}', *flags)
  assert code == 0, error
  assert '@{' not in out and 'None' not in out
  return out


@pytest.mark.parametrize('topology, chips, hosts, machine', [
  ('v4:2x2x1', 4, 1, 'ct4p-hightpu-4t'), ('v4:2x2x4', 16, 4, 'ct4p-hightpu-4t'),
  ('v5e:1x1', 1, 1, 'ct5lp-hightpu-1t'), ('v5e:2x2', 4, 1, 'ct5lp-hightpu-4t'),
  ('v5e:2x4', 8, 1, 'ct5lp-hightpu-8t'), ('v5e:4x4', 16, 4, 'ct5lp-hightpu-4t'),
  ('v5e:16x16', 256, 64, 'ct5lp-hightpu-4t'), ('v5p:2x2x1', 4, 1, 'ct5p-hightpu-4t'),
  ('v5p:4x4x8', 128, 32, 'ct5p-hightpu-4t'), ('v6e:2x4', 8, 1, 'ct6e-standard-8t'),
  ('v6e:4x8', 32, 8, 'ct6e-standard-4t'), ('tpu7x:2x2x2', 8, 2, 'tpu7x-standard-4t'),
])
def test_a_slice_has_so_many_hosts(topology, chips, hosts, machine):
  part = launch.parse_slice(topology)
  assert (part.chips, part.hosts, part.machine) == (chips, hosts, machine)


@pytest.mark.parametrize('topology', ['v5e', 'v5e:4', 'v5e:1x2', 'v5e:2x2x1', 'v5p:4x4', 'v9:2x2',
                                      'v5p:1x1x1', 'v6e:3x3'])
def test_a_slice_that_does_not_exist_is_refused(topology):
  with pytest.raises(ValueError, match=f'--topology={topology}: '):
    launch.parse_slice(topology)


def train_flags(arguments):
  """Check that the program takes these arguments with this config, and return them as a dict."""
  found = dict(re.fullmatch(r'--([\w.]+)(?:=(.*))?', one).groups() for one in arguments)
  assert 'distributed' in found and (ROOT / found['config'].partition(':')[0]).exists()
  changes = {name.removeprefix('config.'): value for name, value in found.items()
             if name.startswith('config.')}
  config_lib.override(config_lib.load(found['config']), changes)
  return found


@pytest.mark.parametrize('config, flags, accelerator', [
  ('gpt3.py:1.3b', ['--nospot'], 'v5litepod-64'), ('gpt3.py:13b', [], 'v5p-256'),
  ('llama.py:llama3_8b', ['--workdir=gs://b/r/x y', '--config.training.num_steps=5000'], 'v5p-128'),
])
def test_the_script_for_tpu_vms_is_bash_and_asks_for_the_slice(config, flags, accelerator):
  text = printed('tpuvm', *flags, config=config)
  subprocess.run(['bash', '-n'], input=text, text=True, check=True)
  assert f'--accelerator-type={accelerator} ' in text
  assert ('--spot' in text) == ('--nospot' not in flags)
  found = re.search(r'^ARGUMENTS=\((.*?)^\)$', text, re.M | re.S)[1]
  arguments = train_flags(shlex.split(found.replace('\\\n', ' ')))
  if len(flags) > 1:
    assert {name: arguments[name] for name in (
      'workdir', 'config.training.num_steps', 'config.records_dir')} == {
        'workdir': 'gs://b/r/x y', 'config.training.num_steps': '5000',
        'config.records_dir': 'gs://b/r/records'}
  known = extras()
  wanted = re.search(r"\.\[([\w,]+)\]", text)[1].split(',')
  assert set(wanted) <= known
  # What it installs is a Python that the package takes.
  python = re.search(r'--python (3\.\d+)', text)[1]
  assert f'Python :: {python}' in (ROOT / 'setup.cfg').read_text()


@pytest.mark.parametrize('file, target, flags', [
  ('tpuvm.sh', 'tpuvm', []), ('gke.yaml', 'gke', []), ('Dockerfile', 'image', []),
  ('slurm.sh', 'slurm', ['--nodes=2']),
])
def test_the_recipes_that_lie_there_are_those_that_are_printed(file, target, flags):
  config = 'gpt2_124m.py:h100' if flags else 'gpt3.py:13b'
  assert (ROOT / 'experiments' / 'launch' / file).read_text() == printed(
    target, *flags, config=config)


def extras():
  text = (ROOT / 'setup.cfg').read_text().partition('[options.extras_require]')[2]
  return set(re.findall(r'^(\w+) =$', text.partition('\n[')[0], re.M))


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


def jobset(text):
  """Check a JobSet, and return (its spec, its job, its container)."""
  value = yaml.safe_load(text)
  check(value, JOBSET)
  assert (value['apiVersion'], value['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  # Names of hosts: at most 63 characters with what is put behind them.
  assert re.fullmatch(r'[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?', value['metadata']['name'])
  replicated, = value['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  # An exit code is asked for, which Kubernetes allows with this alone.
  assert pod['restartPolicy'] == 'Never' and job['completionMode'] == 'Indexed'
  assert {volume['name'] for volume in pod.get('volumes', ())} >= {
    mount['name'] for mount in pod['containers'][0].get('volumeMounts', ())}
  rule, = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2] and rule['onExitCodes']['containerName'] == 'train'
  return replicated, job, pod['containers'][0]


@pytest.mark.parametrize('flags, chips, hosts, slices', [
  ([], 4, 16, 1), (['--topology=v5e:4x8', '--slices=2'], 4, 8, 2),
  (['--topology=v5e:8x8'], 4, 16, 1),
])
def test_the_jobset_has_the_hosts_of_the_slice(flags, chips, hosts, slices):
  replicated, job, container = jobset(printed('gke', *flags))
  assert (job['parallelism'], job['completions'], replicated['replicas']) == (hosts, hosts, slices)
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  flags = train_flags(container['args'])
  assert flags['workdir'] == 'gs://BUCKET/runs/gpt3_1.3b'
  assert flags.get('config.mesh.slices', '1') == str(slices)


def test_a_slice_that_the_mesh_does_not_fill_is_refused():
  code, _, error = programs.run('tools.launch', '--config=experiments/gpt3.py:13b', '--for=gke',
                                '--topology=v5e:4x4')
  assert code == 2 and 'error: config.mesh (' in error and 'there are 16' in error


def test_gpus_get_a_jobset_and_a_batch_script():
  flags = ['--nodes=4', '--workdir=/shared/runs/gpt2']
  replicated, job, container = jobset(printed('gke', *flags, config='gpt2_124m.py:h100'))
  assert job['parallelism'] == 4 and container['resources']['limits'] == {'nvidia.com/gpu': 8}
  assert {one['name']: one['value'] for one in container['env']} == {
    'JAX_COORDINATOR_ADDRESS': 'gpt2-124m-nodes-0-0.gpt2-124m:8482', 'JAX_NUM_PROCESSES': '4'}

  text = printed('slurm', *flags, config='gpt2_124m.py:h100')
  subprocess.run(['bash', '-n'], input=text, text=True, check=True)
  directives = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', text, re.M))
  assert len(directives) == text.count('#SBATCH')
  # sbatch reads them up to the first command.
  assert text.rindex('#SBATCH') < re.search(r'^[^#\n]', text, re.M).start()
  assert {name: directives[name] for name in ('nodes', 'ntasks-per-node', 'gpus-per-node')} == {
    'nodes': '4', 'ntasks-per-node': '8', 'gpus-per-node': '8'}
  assert directives['signal'] == 'TERM@300' and 'requeue' in directives
  command = re.search(r'^srun (?:--\S+ )*venv/bin/python -m jaxllm.train (.*?[^\\])$', text,
                      re.M | re.S)[1]
  command = command.replace('\\\n', ' ')
  assert train_flags(shlex.split(command))['workdir'] == '/shared/runs/gpt2'


def test_the_image_trains():
  text = printed('image')
  lines = [line for line in text.splitlines() if line and not line.startswith(('#', ' '))]
  assert {line.split()[0] for line in lines} <= {
    'FROM', 'ENV', 'WORKDIR', 'COPY', 'RUN', 'ENTRYPOINT'}
  entry, = [line for line in lines if line.startswith('ENTRYPOINT')]
  assert json.loads(entry.partition(' ')[2]) == ['python', '-m', 'jaxllm.train']
  for line in lines:
    if line.startswith('COPY'):
      assert all((ROOT / name).exists() for name in line.split()[1:-1])


@pytest.mark.parametrize('flags, said', [
  (['--config=experiments/quickstart.py', '--for=tpuvm'], 'names no TPU slice'),
  (['--config=experiments/quickstart.py', '--for=slurm'], '--nodes is missing'),
  (['--config=experiments/gpt3.py:13b', '--for=tpuvm', '--topology=tpu7x:4x4x4'], '--for=gke'),
])
def test_what_is_not_known_is_asked_for(flags, said):
  code, _, error = programs.run('tools.launch', *flags)
  assert code == 2 and said in error


@pytest.mark.parametrize('wanted, devices, sizes', [
  ({'data': 4, 'fsdp': 32}, 4, {'data': 2, 'fsdp': 2}),
  ({'data': 1, 'fsdp': 128, 'tensor': 8}, 4, {'fsdp': 2, 'tensor': 2}),
  ({'data': -1}, 4, {'data': 4}), ({'data': 1}, 2, {'data': 2}),
  ({'data': 2, 'fsdp': 16}, 8, {'data': 2, 'fsdp': 4}), ({'data': 3, 'tensor': 2}, 3, {'data': 3}),
])
def test_the_mesh_of_a_stand_in_splits_the_same_axes(wanted, devices, sizes):
  found = rehearsal.mesh(MeshConfig(**wanted), devices)
  assert mesh_shape(found, devices)
  assert {name: size for name in wanted | sizes if (size := getattr(found, name)) != 1} == sizes


@pytest.mark.parametrize('location', ['gpt3.py:175b', 'llama.py:llama3_70b', 'preference.py:small',
                                      'gpt2_124m.py:h100', 'sentiment.py'])
def test_experiments_have_stand_ins(location, tmp_path):
  experiment = config_lib.load(f'experiments/{location}')
  small = rehearsal.stand_in(experiment, tmp_path, 4)
  assert small.optimizer == experiment.optimizer and small.task == experiment.task
  assert small.objective.kind == experiment.objective.kind
  assert small.data.packing == experiment.data.packing


def test_a_rehearsal_says_what_a_preemption_costs(tmp_path, capsys):
  experiment = tiny_run.experiment(tmp_path, data__validation=None)
  found = rehearsal.rehearse(experiment, str(tmp_path / 'run'), str(tmp_path), 2)
  assert found['step'] == rehearsal.STEPS
  assert found['SIGTERM']['codes'] == [75, 75] and found['SIGTERM']['steps_lost'] == 0
  assert 0 not in found['SIGKILL']['codes']
  assert 0 <= found['SIGKILL']['steps_lost'] <= rehearsal.SAVE_EVERY
  assert 'finished: 40 steps' in capsys.readouterr().out
