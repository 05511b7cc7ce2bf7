"""x."""
from physioray.storage import Location
IMPORTANCE_FILE = "importance.json"
def write_sweep_report(out: Location) -> Location:
    """x."""
    return out
