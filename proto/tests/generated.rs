//! The checked-in code is what the `.proto` files say.
//!
//! Invariant: nobody edits generated code by hand. `BLESS=1 cargo test -p thyra-proto` writes it anew.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;

/// Roots of the import graph; everything else is reached from these.
const ROOTS: [&str; 8] = [
    "envoy/service/discovery/v3/ads.proto",
    "istio/workload/workload.proto",
    "istio/security/authorization.proto",
    "istio/security/v1beta1/authorization_policy.proto",
    "istio/security/v1beta1/peer_authentication.proto",
    "istio/security/v1beta1/request_authentication.proto",
    "istio/mcp/v1alpha1/resource.proto",
    "thyra/v1/admin.proto",
];

/// Not reached by any import.
const LEAVES: [&str; 1] = ["istio/mesh/v1alpha1/config.proto"];

type Outcome = Result<(), Box<dyn Error>>;

#[test]
fn generated_code_matches_the_proto_files() -> Outcome {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let checked_in = here.join("src/generated");
    let fresh = tempfile::tempdir()?;
    generate(&here.join("proto"), fresh.path())?;
    let wanted = files(fresh.path())?;
    if std::env::var_os("BLESS").is_some() {
        return bless(&checked_in, &wanted);
    }
    let held = files(&checked_in)?;
    let stale: Vec<&String> = wanted
        .keys()
        .chain(held.keys())
        .filter(|name| wanted.get(*name) != held.get(*name))
        .collect();
    assert!(
        stale.is_empty(),
        "stale: {stale:?}; run `BLESS=1 cargo test -p thyra-proto` and commit the result"
    );
    Ok(())
}

#[test]
fn every_proto_file_is_generated_from() -> Outcome {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = compile(&root)?;
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&root)?.to_string_lossy().into_owned();
                assert!(
                    set.file.iter().any(|file| file.name() == name),
                    "`{name}` is reached by no root"
                );
            }
        }
    }
    Ok(())
}

fn compile(protos: &Path) -> Result<prost_types::FileDescriptorSet, Box<dyn Error>> {
    let mut compiler = protox::Compiler::new([protos])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(ROOTS.iter().chain(&LEAVES))?;
    Ok(compiler.file_descriptor_set())
}

fn generate(protos: &Path, out: &Path) -> Outcome {
    let mut set = compile(protos)?;
    let mut config = tonic_prost_build::Config::new();
    config.btree_map(["."]);
    tonic_prost_build::configure()
        .out_dir(out)
        .compile_fds_with_config(set.clone(), config)?;
    // Readers of descriptors want names and numbers; comments are three quarters of the bytes.
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set.file.retain(|file| file.package().starts_with("istio."));
    fs::write(out.join("istio.binpb"), set.encode_to_vec())?;
    Ok(())
}

fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, Box<dyn Error>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found.insert(
            entry.file_name().to_string_lossy().into_owned(),
            fs::read(entry.path())?,
        );
    }
    Ok(found)
}

fn bless(folder: &Path, wanted: &BTreeMap<String, Vec<u8>>) -> Outcome {
    for name in files(folder)?.keys().filter(|name| !wanted.contains_key(*name)) {
        fs::remove_file(folder.join(name))?;
    }
    for (name, bytes) in wanted {
        fs::write(folder.join(name), bytes)?;
    }
    Ok(())
}
