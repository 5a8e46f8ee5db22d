"""The README says what the repository does."""

import re
from pathlib import Path

import yaml

from aplsmear.data import schema

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line.removeprefix("$ ").split("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_its_make_commands_are_targets_of_the_makefile() -> None:
    made = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"demo", "test"} <= made <= TARGETS


def test_the_stages_that_it_names_exist() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    named = {
        word for command in commands() if command.startswith("dvc repro") for word in command.split()[2:]
    }
    assert named
    assert named <= stages.keys()


def test_every_profile_is_named_here_or_in_import_md_or_encoders_md_and_no_other() -> None:
    page = "".join(
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("import", "encoders")
    )
    named = set(re.findall(r"aplsmear profile (\w+)", README)) | set(
        re.findall(r"profiles/(\w+)\.yaml", page)
    )
    assert named == {path.stem for path in (ROOT / "profiles").glob("*.yaml")}


def test_the_files_that_it_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tables_of_a_data_set_are_those_of_the_schema() -> None:
    page = (ROOT / "docs" / "data-format.md").read_text(encoding="utf-8")
    for table in (schema.SMEARS, schema.CELLS):
        lines = [
            f"`{table.name}`: {table.description}.",
            "",
            "| column | needed | what it holds | example |",
            "|---|---|---|---|",
        ]
        for name, column in table.columns.items():
            needed = "yes" if column.required else "no"
            lines.append(f"| `{name}` | {needed} | {column.description} | `{column.metadata['example']}` |")
        assert "\n".join(lines) in page


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_tree_that_it_shows_is_there() -> None:
    (tree,) = re.findall(r"```text\n(dvc\.yaml .*?)```", README, re.DOTALL)
    entries = [word for line in tree.splitlines() for word in line.split("#")[0].split("  ")[0].split()[:1]]
    assert len(entries) > 8
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []


def test_params_yaml_is_the_demo_profile() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles" / "demo.yaml").read_bytes()
