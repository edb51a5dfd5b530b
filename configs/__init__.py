"""The configurations of training runs.

skysense_full and msgfm_base are the recipes, complete and with a reason beside each field; every other configuration is
a recipe made smaller. From Python: from skysense_jax.configs import skysense_full.
"""
