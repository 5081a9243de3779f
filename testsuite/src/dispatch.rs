//! The interpreter's dispatch table, read from its source: which file and function carries out an instruction.
//!
//! A function pointer does not say its name, and a second table of names could disagree with the first.

use bivisor_emulator::isa::facts;
use bivisor_emulator::vcpu::How;
use iced_x86::Code;
use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

/// A row of `dispatch.rs`: `M::A | M::B if i.facts.class == Class::C => module::function,`.
pub struct Row {
    mnemonics: Vec<String>,
    /// The row is for this class only.
    pub class: Option<String>,
    /// `module::function`.
    pub function: String,
}

/// All rows, in order.
///
/// # Panics
/// If the source has another shape than one row a line.
pub fn rows() -> Vec<Row> {
    let path = root().join("emulator/src/interp/dispatch.rs");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let body = text.split("match i.iced.mnemonic() {").nth(1).expect("the match");
    let body = body.split("\n    }").next().expect("its end");
    let mut rows = Vec::new();
    for line in body.lines().map(|l| l.split("//").next().unwrap_or("").trim()).filter(|l| !l.is_empty()) {
        let (pattern, function) = line.split_once("=>").unwrap_or_else(|| panic!("`{line}` is no row"));
        let (mnemonics, guard) = pattern.split_once(" if ").unwrap_or((pattern, ""));
        let class = guard.trim().strip_prefix("i.facts.class == Class::").map(str::to_string);
        assert!(guard.is_empty() || class.is_some(), "`{line}`: a guard by class, or none");
        rows.push(Row {
            mnemonics: mnemonics.split('|').map(|m| m.trim().trim_start_matches("M::").to_string()).collect(),
            class,
            function: function.trim().trim_end_matches(',').to_string(),
        });
    }
    rows
}

/// The function that `op` gives for a code: of the first row that fits.
pub fn function_of(rows: &[Row], code: Code) -> &str {
    let mnemonic = format!("{:?}", code.mnemonic());
    let class = format!("{:?}", facts(code).class);
    let fits = |r: &&Row| {
        r.mnemonics.iter().any(|m| *m == mnemonic || m == "_") && r.class.as_ref().is_none_or(|c| *c == class)
    };
    rows.iter().find(fits).map_or("undefined", |r| &r.function)
}

/// The module of that function.
pub fn module_of(rows: &[Row], code: Code) -> &str {
    function_of(rows, code).split("::").next().expect("a path")
}

/// How the interpreter carries out a code.
pub fn how(rows: &[Row], code: Code) -> How {
    match function_of(rows, code) {
        "undefined" => How::Unsupported,
        "native::run" => How::Native,
        _ => How::Function,
    }
}
