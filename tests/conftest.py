"""What every test runs under: eight host devices for the sharding tests, and hypothesis without a clock."""

import os

import hypothesis
import jax

HOST_DEVICES = 8


def pytest_configure(config):
    """Set before the first test module is imported, since the number of devices is fixed when a backend starts."""
    del config
    jax.config.update("jax_num_cpu_devices", HOST_DEVICES)
    # No deadline: the first example of a jitted function pays for its compilation.
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
