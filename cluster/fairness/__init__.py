"""``make fairness``: what every tenant gets when tenants compete, on the real service and under virtual time."""
