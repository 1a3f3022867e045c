"""Tiny real models and a tokenizer, built in code without any download, for our tests and for plugin authors.

:class:`EditorContract`, :class:`StabilizerContract`, :class:`DiagnosticContract` and :class:`FormatContract` are test
classes to inherit from: what everything that a plugin brings has to hold. :func:`tiny_session` opens a tiny model as a
component sees it, with second moments and pilot edits. :data:`TINY` lists the families. :class:`Plugins`, :func:`build`
and :func:`from_record` load plugins, options and edits as the program does.
"""

from editcli.plugin.manager import Plugins as Plugins
from editcli.plugin.options import build as build
from editcli.requests.schema import from_record as from_record
from editcli.testing.contracts import EditorContract as EditorContract
from editcli.testing.contracts import StabilizerContract as StabilizerContract
from editcli.testing.diagnostics import DiagnosticContract as DiagnosticContract
from editcli.testing.formats import FormatContract as FormatContract
from editcli.testing.models import BOS as BOS
from editcli.testing.models import CHAT_TEMPLATE as CHAT_TEMPLATE
from editcli.testing.models import EOS as EOS
from editcli.testing.models import EXPERTS as EXPERTS
from editcli.testing.models import HIDDEN as HIDDEN
from editcli.testing.models import INTERMEDIATE as INTERMEDIATE
from editcli.testing.models import LAYERS as LAYERS
from editcli.testing.models import MIXTURES as MIXTURES
from editcli.testing.models import PAD as PAD
from editcli.testing.models import POSITIONS as POSITIONS
from editcli.testing.models import TINY as TINY
from editcli.testing.models import randomize as randomize
from editcli.testing.models import tiny_config as tiny_config
from editcli.testing.models import tiny_model as tiny_model
from editcli.testing.models import tiny_model_folder as tiny_model_folder
from editcli.testing.models import tiny_tokenizer as tiny_tokenizer
from editcli.testing.models import vocabulary_size as vocabulary_size
from editcli.testing.sessions import PlainEditor as PlainEditor
from editcli.testing.sessions import same_state as same_state
from editcli.testing.sessions import same_tensors as same_tensors
from editcli.testing.sessions import through_bytes as through_bytes
from editcli.testing.sessions import tiny_problem as tiny_problem
from editcli.testing.sessions import tiny_requests as tiny_requests
from editcli.testing.sessions import tiny_second_moment as tiny_second_moment
from editcli.testing.sessions import tiny_session as tiny_session
