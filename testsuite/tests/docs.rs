//! The documents against what they describe: generated pages, the README's totals, the names of engines, links between files.

use bivisor_testsuite::{dispatch::root, pages};

const BEGIN: &str = "<!-- totals: UPDATE=1 cargo test -p bivisor-testsuite --test docs -->\n";
const END: &str = "<!-- end of totals -->\n";

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Compares a file with what it must be; with `UPDATE=1` writes it.
fn must_be(name: &str, text: &str) {
    let path = root().join(name);
    let is = std::fs::read_to_string(&path).unwrap_or_default();
    if is == text {
        return;
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("writable");
        std::fs::write(&path, text).expect("writable");
        return;
    }
    let line = is.lines().zip(text.lines()).position(|(a, b)| a != b);
    let line = line.unwrap_or(is.lines().count().min(text.lines().count()));
    panic!(
        "{name} is out of date from line {}:\n  is: {}\n  should be: {}\n\
         UPDATE=1 cargo test -p bivisor-testsuite --test docs writes it; read the difference before you commit it",
        line + 1,
        is.lines().nth(line).unwrap_or("(end)"),
        text.lines().nth(line).unwrap_or("(end)"),
    );
}

#[test]
fn the_page_of_system_calls_is_the_table() {
    must_be("docs/syscalls.md", &pages::syscalls());
}

#[test]
fn the_page_of_instructions_is_the_facts_table() {
    must_be("docs/instructions.md", &pages::instructions());
}

#[test]
fn the_page_of_fidelity_is_the_summary() {
    must_be("docs/fidelity.md", &bivisor_testsuite::campaign::matrix::page());
}

/// Tests that the checklist names are there.
#[test]
fn the_checklist_names_tests_that_exist() {
    fn sources(dir: &std::path::Path, out: &mut String) {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                sources(&path, out);
            } else if name.ends_with(".rs") {
                *out += &std::fs::read_to_string(&path).expect("readable");
            }
        }
    }
    let mut all = String::new();
    sources(&root(), &mut all);
    let text = read("docs/checklist.md");
    let rows: Vec<&str> = text.lines().filter(|l| l.starts_with("| ")).skip(2).collect();
    assert!(rows.len() >= 40, "{} classes", rows.len());
    for row in rows {
        let tests: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty() && row.matches('|').count() == 5, "{row}");
        for test in tests {
            assert!(all.contains(&format!("fn {test}()")), "no test {test}");
        }
    }
}

#[test]
fn the_readme_quotes_the_totals() {
    let readme = read("README.md");
    let (before, rest) = readme.split_once(BEGIN).expect("where the totals begin");
    let (_, after) = rest.split_once(END).expect("where the totals end");
    must_be("README.md", &format!("{before}{BEGIN}{}{END}{after}", pages::totals()));
}

/// The lines of a section of a document.
fn section<'a>(text: &'a str, heading: &str) -> Vec<&'a str> {
    let mut lines = text.lines().skip_while(|l| *l != heading);
    assert!(lines.next().is_some(), "the heading `{heading}`");
    lines.take_while(|l| !l.starts_with('#')).collect()
}

/// The values of `--backend` are the names in `Backend::name`.
#[test]
fn the_readme_has_a_row_for_every_engine() {
    let source = read("src/engine.rs");
    let body =
        source.split("pub fn name(self)").nth(1).expect("Backend::name").split("\n    }").next().expect("its end");
    let names: Vec<&str> = body.split('"').skip(1).step_by(2).collect();
    assert!(names.len() >= 4, "{names:?}");
    let readme = read("README.md");
    let table = section(&readme, "## Which engine does what");
    for name in names {
        assert!(table.iter().any(|l| l.starts_with(&format!("| `{name}` |"))), "the README's table lacks `{name}`");
    }
}

/// Targets of `[text](target)`.
fn links(text: &str) -> Vec<&str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target).collect()
}

#[test]
fn links_point_to_files() {
    let mut wrong = Vec::new();
    let mut found = 0;
    for name in
        ["README.md", "ARCHITECTURE.md", "SECURITY.md", "bench/README.md", "docs/syscalls.md", "docs/instructions.md"]
    {
        let text = read(name);
        let file = root().join(name);
        for link in links(&text).into_iter().filter(|l| !l.contains("://") && !l.starts_with('#')) {
            found += 1;
            let path = link.split('#').next().expect("a path");
            if !file.parent().expect("a directory").join(path).exists() {
                wrong.push(format!("{name}: {link}"));
            }
        }
    }
    assert!(wrong.is_empty(), "links to files that do not exist\n{}", wrong.join("\n"));
    assert!(found >= 5, "only {found} links: are they still found?");
}
