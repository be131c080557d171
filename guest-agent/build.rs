//! Leaves symbols and debug information out of the release binary: it lies in the memory of every guest, and the
//! profile's `strip` does not reach what the musl target links in.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::rustc-link-arg-bins=-s");
    }
}
