//! How the program is linked.

fn main() {
    // Thousands of tables hold addresses, and the program moves wherever the guest does not want to be: in the short form of relocations
    // they cost a start less. Linkers that do not know it, or whose C library does not, leave it.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo:rerun-if-changed=build.rs");
}
