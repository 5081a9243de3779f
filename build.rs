//! How the program is linked.
//!
//! A start is faster without a dynamic linker, shared libraries and what their constructors ask the CPU: half a millisecond of a process
//! that may take three. Asking for a static C library by a target feature would be for all crates and all profiles, and no build would
//! succeed where there is none; so it is done for the finished program alone, in a release build, if all parts are there.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Shared libraries that Rust's standard library is linked with, and what has their content.
const LIBRARIES: [(&str, &[&str]); 7] = [
    ("gcc_s", &["libgcc_eh.a", "libgcc.a"]),
    ("c", &["libc.a"]),
    ("m", &["libm.a"]),
    ("dl", &["libdl.a"]),
    ("pthread", &["libpthread.a"]),
    ("rt", &["librt.a"]),
    ("util", &["libutil.a"]),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Thousands of tables hold addresses, and the program moves wherever the guest does not want to be: in the short form of relocations
    // they cost a start less. Linkers that do not know it, or whose C library does not, leave it.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    let release = env::var("PROFILE").is_ok_and(|p| p == "release");
    let here = env::var("HOST").ok() == env::var("TARGET").ok();
    if release && here && env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|e| e == "gnu") {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where"));
        if link_statically(&out).is_none() {
            println!("cargo:warning=no static C library: bivisor will need half a millisecond more to start");
        }
    }
}

/// The file, as the C compiler would link it.
fn find(name: &str) -> Option<PathBuf> {
    let said = Command::new("cc").arg(format!("-print-file-name={name}")).output().ok()?;
    let path = PathBuf::from(String::from_utf8(said.stdout).ok()?.trim());
    path.is_absolute().then_some(path).filter(|p| p.exists())
}

/// Puts a linker script in the place of each shared library, which names static ones. `None` if one is not there.
fn link_statically(out: &Path) -> Option<()> {
    find("rcrt1.o")?;
    for (shared, parts) in LIBRARIES {
        let parts: Option<Vec<_>> = parts.iter().map(|name| Some(find(name)?.display().to_string())).collect();
        std::fs::write(out.join(format!("lib{shared}.so")), format!("GROUP ( {} )\n", parts?.join(" "))).ok()?;
    }
    println!("cargo:rustc-link-arg-bin=bivisor=-static-pie");
    println!("cargo:rustc-link-arg-bin=bivisor=-L{}", out.display());
    Some(())
}
