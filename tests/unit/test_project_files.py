# SPDX-License-Identifier: Apache-2.0
"""The files around the code agree with it: workflows, hooks, citation, changelog, links between pages."""

import re
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parents[2]
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
ISSUE_FORMS = sorted(path for path in (REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
PAGES = [
    *(path for path in REPO.glob("*.md")),
    *(path for folder in ("docs", "examples", "patches") for path in (REPO / folder).rglob("*.md")),
]
README = REPO / "README.md"
PYPROJECT = (REPO / "pyproject.toml").read_text()


def in_pyproject(pattern: str) -> list[str]:
    """Return what a pattern's group matches in pyproject.toml; Python 3.10 has no parser for it."""
    found = re.findall(pattern, PYPROJECT, re.MULTILINE)
    assert found, pattern
    return found


def load(path: Path):
    return yaml.safe_load(path.read_text())


def jobs(workflow: Path) -> dict:
    return load(workflow)["jobs"]


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


# --- workflows --------------------------------------------------------------------------------------------------------


def test_workflows_and_forms_are_found():
    assert {path.stem for path in WORKFLOWS} == {"ci", "end_to_end"}
    assert {path.stem for path in ISSUE_FORMS} == {"bug", "feature", "question"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_only_what_the_tree_has(workflow):
    commands = [step["run"] for job in jobs(workflow).values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        program, script, *arguments = command.split()
        assert program == "bash" and (REPO / script).is_file(), command
        for argument in arguments:
            assert argument == "lint" or (REPO / argument).is_dir(), command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_their_major_version(workflow):
    uses = [step["uses"] for job in jobs(workflow).values() for step in job["steps"] if "uses" in step]
    assert any(name.startswith("actions/checkout@") for name in uses)
    for name in uses:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", name), name


def test_the_tests_run_on_every_python_that_the_package_claims():
    matrix = jobs(REPO / ".github/workflows/ci.yml")["tests"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in matrix), "3.10 without quotes is the number 3.1"
    (oldest,) = in_pyproject(r'^requires-python = ">=(\d+\.\d+)"')
    assert min(matrix, key=minor) == oldest
    assert matrix == in_pyproject(r'"Programming Language :: Python :: (\d+\.\d+)"')
    # Lint and types look at the code as the oldest of them would.
    assert in_pyproject(r'^target-version = "py(\d)(\d+)"') == [tuple(oldest.split("."))]
    assert in_pyproject(r'^python_version = "(.*)"') == [oldest]


def test_all_levels_of_tests_run_in_some_workflow():
    commands = " ".join(step.get("run", "") for w in WORKFLOWS for job in jobs(w).values() for step in job["steps"])
    levels = [path for path in (REPO / "tests").iterdir() if list(path.glob("test_*.py"))]
    assert len(levels) == 3
    for level in levels:
        assert f"tests/{level.name}" in commands


def test_the_end_to_end_level_runs_every_night_and_on_demand():
    # YAML 1.1 reads the key `on` as true.
    assert load(REPO / ".github/workflows/end_to_end.yml")[True].keys() == {"schedule", "workflow_dispatch"}


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_the_hooks_lint_with_the_version_of_the_dev_extra():
    repos = load(REPO / ".pre-commit-config.yaml")["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("/ruff-pre-commit"))
    assert [ruff["rev"]] == [f"v{version}" for version in in_pyproject(r'"ruff==(.*)"')]
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_type_hook_is_local_and_checks_what_mypy_is_configured_for():
    repos = load(REPO / ".pre-commit-config.yaml")["repos"]
    (local,) = (repo for repo in repos if repo["repo"] == "local")
    (mypy,) = local["hooks"]
    assert mypy["entry"] == "python -m mypy" and mypy["language"] == "system" and not mypy["pass_filenames"]
    (folders,) = in_pyproject(r"^files = \[(.*)\]")
    for folder in re.findall(r'"(.*?)"', folders):
        assert re.match(mypy["files"], f"{folder}/module.py")


# --- forms, citation, changelog ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ISSUE_FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_requires(form):
    content = load(form)
    assert content["name"] and content["description"]
    assert len({part["id"] for part in content["body"]}) == len(content["body"])
    assert any(part.get("validations", {}).get("required") for part in content["body"])


def test_a_bug_report_asks_for_the_doctor():
    (doctor,) = (part for part in load(REPO / ".github/ISSUE_TEMPLATE/bug.yml")["body"] if part["id"] == "doctor")
    assert "verl-gndpo doctor --verbose" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_the_citation_has_the_keys_that_cff_1_2_requires():
    citation = load(REPO / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and citation["authors"]
    assert [citation["version"]] == in_pyproject(r'^version = "(.*)"')
    assert [citation["license"]] == in_pyproject(r'^license = "(.*)"')
    for reference in citation["references"]:
        assert reference["type"] and reference["title"]
        for author in reference["authors"]:
            assert "name" in author or {"family-names", "given-names"} <= author.keys()
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2606.09091"
    assert in_pyproject(r'^Paper = "(.*)"') == ["https://arxiv.org/abs/2606.09091"]


def test_the_changelog_keeps_its_form():
    headings = re.findall(r"^## (.*)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    for released in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d{2}-\d{2}", released)
    groups = set(re.findall(r"^### (.*)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- pages ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_readme_is_short_before_more():
    before = README.read_text().split("\n## More\n")
    assert len(before) == 2
    assert len(before[0].split()) <= 1000


def test_the_architecture_page_shows_every_room():
    tree = (REPO / "docs/architecture.md").read_text().split("```\nverl_gndpo/\n")[1].split("```")[0]
    shown = set(re.findall(r"^  ([\w.]+)/? ", tree, re.MULTILINE))
    package = REPO / "verl_gndpo"
    modules = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert shown == modules | folders


def test_names_on_the_architecture_page_exist():
    page = (REPO / "docs/architecture.md").read_text()
    source = "".join(path.read_text() for path in (REPO / "verl_gndpo").rglob("*.py"))
    names = re.findall(r"`((?:trainer|teacher|observe|advantage)\.(?!py`)[\w.]+)`", page)
    assert len(names) >= 5
    for name in names:
        assert re.search(rf"\b(?:def|class) {name.rpartition('.')[2]}\b", source) or module_exists(name), name


def module_exists(name: str) -> bool:
    return (REPO / "verl_gndpo" / f"{name.replace('.', '/')}.py").is_file()


def test_every_example_is_in_the_examples_table():
    table = (REPO / "examples" / "README.md").read_text()
    for script in [*(REPO / "examples").glob("*.sh"), *(REPO / "examples").glob("*/*.py")]:
        if script.name != "__init__.py":
            assert f"({script.relative_to(REPO / 'examples')})" in table, script.name
