"""How many gangs Ray Serve should run: as many as the jobs in the store keep busy.

Jobs do not pass through Serve's handles, so its own count of ongoing requests says nothing; the
dispatcher counts, tells every gang that registers, and each replica reports it to Serve. Serve applies
its delays and bounds to what is returned here. It finds the function by its import path.
"""

import math
from typing import Any

WANTED_GANGS = "wanted_gangs"


def num_wanted(num_jobs: int, max_resident: int) -> int:
    """Gangs that hold so many unfinished jobs; at least one."""
    return max(1, math.ceil(num_jobs / max_resident))


def gangs_for_backlog(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy of the denoiser; what it has while nobody has reported."""
    reported = (context.aggregated_metrics or {}).get(WANTED_GANGS, {})
    return round(max(reported.values(), default=context.target_num_replicas)), {}
