//! Where the workspace lies, and what the interpreter's dispatch table says.

pub use bivisor_emulator::interp::names::{function_of, how, module_of, place, rows};
use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}
