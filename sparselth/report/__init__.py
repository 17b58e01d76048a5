"""What a run says: statistics, tables and figures drawn from its folder alone."""

import logging

# where its own cache cannot be, matplotlib works without, and says so in four lines that help nobody here
logging.getLogger("matplotlib").setLevel(logging.ERROR)
