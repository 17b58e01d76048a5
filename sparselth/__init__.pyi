from sparselth.calls import prune as prune
from sparselth.calls import rewind as rewind
from sparselth.calls import snapshot as snapshot
from sparselth.cluster.grid import Grid as Grid
from sparselth.cluster.sweep import sweep as sweep
from sparselth.masks import Masks as Masks
from sparselth.optim import MaskedAdam as MaskedAdam
from sparselth.optim import MaskedAdamW as MaskedAdamW
from sparselth.optim import MaskedSGD as MaskedSGD
from sparselth.own import imp as imp
from sparselth.sparse import compress as compress
from sparselth.sparse import convert as convert
from sparselth.sparse import dense as dense
from sparselth.sparse import explain as explain
from sparselth.tickets import load_ticket as load_ticket
from sparselth.tickets import save_ticket as save_ticket

__version__: str
