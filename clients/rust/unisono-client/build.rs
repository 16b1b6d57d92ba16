//! Makes the contract's code from the repository's `protos/`. The compiler is in Rust too, so cargo is all one needs.

use std::env;
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let contract = package.join("../../../protos");
    let borrowed = package.join("proto");
    println!("cargo::rerun-if-changed={}", contract.join("unisono").display());
    println!("cargo::rerun-if-changed={}", borrowed.display());
    let files = protox::compile(["unisono/v1/batch_inference.proto"], [contract, borrowed])?;
    tonic_prost_build::configure()
        .build_server(false)
        .extern_path(".google.rpc", "::tonic_types::pb")
        .compile_fds(files)?;
    Ok(())
}
