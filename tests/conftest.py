import os

# Threads that wait must sleep: the tests run more of them than there are cores. Before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
