//! What the conformance tests of the engines share: the app, built as one static program.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Compiles `examples/guest_app.rs` for musl. It needs nothing but the standard library, so the compiler alone does it.
pub fn guest_app(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/guest_app.rs");
    let program = dir.join("guest_app");
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = Command::new(compiler)
        .args(["--edition=2024", "--target=x86_64-unknown-linux-musl", "-Copt-level=2", "-Cstrip=symbols", "-o"])
        .arg(&program)
        .arg(source)
        .output()
        .expect("rustc can be run");
    assert!(output.status.success(), "the guest app does not compile: {}", String::from_utf8_lossy(&output.stderr));
    program
}
