"""Readers of the field's edit files, as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_formats():
    from editcli_formats.counterfact import CounterFact
    from editcli_formats.easyedit import EasyEdit
    from editcli_formats.knowedit import KnowEdit
    from editcli_formats.mlake import MLaKE
    from editcli_formats.mquake import MQuake
    from editcli_formats.rippleedits import RippleEdits
    from editcli_formats.wikibigedit import WikiBigEdit
    from editcli_formats.zsre import ZsRE

    return [CounterFact, EasyEdit, KnowEdit, MLaKE, MQuake, RippleEdits, WikiBigEdit, ZsRE]
