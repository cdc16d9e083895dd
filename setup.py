"""What setup.cfg cannot say: the experiment files are installed inside of the package."""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=['jaxllm*']), 'jaxllm.experiments'],
  package_dir={'jaxllm.experiments': 'experiments'},
)
