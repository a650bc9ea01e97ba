"""The structure of the project: imports run one way, and platform differences stay in `support`."""

import ast

import pytest
from conftest import ROOT

METHOD = {"model", "dataset", "utils"}  # which do not know each other
SCRIPTS = {"train", "test", "metrics_auc", "metrics_acc", "get_invalid_images"}
MAY_IMPORT = {
    **dict.fromkeys(METHOD, {"support"}),
    "pretrained": {"support", "model", "utils"},
    "colorizer": {"support", *METHOD, "pretrained"},
    "hubconf": {"colorizer", "pretrained"},
    "app": {"support", "dataset", "utils", "pretrained", "colorizer"},
    **dict.fromkeys(SCRIPTS, {"support", *METHOD, "pretrained", "colorizer"}),
}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")], ids=lambda path: path.name)
def test_imports_run_one_way(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = {module.split(".")[0] for module in modules} & {"support", "resources", "tests", *MAY_IMPORT}
    assert ours <= ({"support"} if path.parent != ROOT else MAY_IMPORT[path.stem])


@pytest.mark.parametrize(
    "path",
    [path for folder in ("", "support/", "resources/") for path in ROOT.glob(f"{folder}*.py")],
    ids=lambda x: x.name,
)
def test_code_does_not_depend_on_the_name_of_the_system(path):
    """Code asks for a capability instead."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"sys.platform", "os.name", "platform.system"}
