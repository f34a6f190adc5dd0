"""Device code: each subpackage is a backend with ``can_implement(problem, target)`` and ``run``."""
