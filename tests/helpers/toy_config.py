"""A configuration file of the toy objective, for runs in processes of their own (`tests.helpers.jobs`)."""

from ml_collections import config_dict

from skysense_jax.configs import skysense_tiny


def get_config() -> config_dict.ConfigDict:
    """The tiny configuration without the HR sensor, trained by the recipe "toy"."""
    config = skysense_tiny.get_config("series")
    with config.unlocked():
        config.recipe = "toy"
    return config
