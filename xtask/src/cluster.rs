//! `make cluster`: builds the control plane that tests run against, from the Go modules in testdata/cluster.
//!
//! A finished folder is complete or absent: it is built beside its place and renamed there, and its name
//! carries a hash of everything that decides its content.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use crate::{child, go, hash::fnv1a, tree::Tree, verb::Call};

/// The Go modules, apart because each lives by its own replace lines.
const MODULES: &[&str] = &["etcd", "istio", "kube"];
/// Everything that decides what a module builds.
const MODULE_FILES: &[&str] = &["go.mod", "go.sum", "tools.go"];
/// No cgo (the binaries run anywhere), no paths of this machine, exactly what go.sum says.
const GO_ENV: &[(&str, &str)] = &[
    ("CGO_ENABLED", "0"),
    ("GOFLAGS", "-trimpath -mod=readonly -buildvcs=false"),
    ("GOWORK", "off"),
];
/// Packages compiled at once; more starves whatever else runs.
const PARALLEL: &str = "2";
/// The custom resources of a mesh, in istio's own module.
const CRDS: &str = "manifests/charts/base/files/crd-all.gen.yaml";

struct Binary {
    name: &'static str,
    module: &'static str,
    package: &'static str,
}

const BINARIES: &[Binary] = &[
    Binary {
        name: "etcd",
        module: "etcd",
        package: "go.etcd.io/etcd/server/v3",
    },
    Binary {
        name: "istiod",
        module: "istio",
        package: "istio.io/istio/pilot/cmd/pilot-discovery",
    },
    Binary {
        name: "kube-apiserver",
        module: "kube",
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
    },
    Binary {
        name: "kubectl",
        module: "kube",
        package: "k8s.io/kubernetes/cmd/kubectl",
    },
    Binary {
        name: "kube-proxy",
        module: "kube",
        package: "k8s.io/kubernetes/cmd/kube-proxy",
    },
];

/// What is built, from what, and where it goes.
struct Recipe<'a> {
    tree: &'a Tree,
    cache: PathBuf,
    /// The folder under `cache` that holds the finished build.
    folder: String,
}

/// Builds what is missing and points the `cluster` link at it.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    build(call.tree)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the finished folder's path, whether or not it exists yet.
pub(crate) fn print_path(call: &Call<'_>) -> Result<ExitCode> {
    println!("{}", Recipe::new(call.tree)?.path().display());
    Ok(ExitCode::SUCCESS)
}

/// Builds what is missing; returns the folder.
///
/// # Errors
/// No usable Go, a module that can't be fetched or built, or a cache folder that can't be written.
pub(crate) fn build(tree: &Tree) -> Result<PathBuf> {
    let recipe = Recipe::new(tree)?;
    let path = recipe.path();
    if path.is_dir() {
        println!("cluster: ready in {}", path.display());
    } else {
        recipe.build_into_place()?;
    }
    recipe.point_link()?;
    Ok(path)
}

impl<'a> Recipe<'a> {
    fn new(tree: &'a Tree) -> Result<Self> {
        let mut text = format!("{GO_ENV:?}");
        for binary in BINARIES {
            let flags = linker_flags(tree, binary.module)?;
            write!(
                text,
                "\n{} {} {} {flags}",
                binary.name, binary.module, binary.package
            )?;
        }
        for module in MODULES {
            for file in MODULE_FILES {
                text.push_str(&fs::read_to_string(module_folder(tree, module).join(file))?);
            }
        }
        Ok(Self {
            tree,
            cache: cache_folder()?,
            folder: format!("cluster-{:016x}", fnv1a(text.as_bytes())),
        })
    }

    fn path(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    fn build_into_place(&self) -> Result<()> {
        let go = go::find_or_install()?;
        let started = Instant::now();
        println!(
            "cluster: building into {} (some ten minutes, once)",
            self.path().display()
        );
        self.sweep()?;
        let scratch = self
            .cache
            .join(format!("{}.tmp-{}", self.folder, std::process::id()));
        fs::create_dir_all(scratch.join("bin"))
            .with_context(|| format!("can't write `{}`", scratch.display()))?;
        let built = self
            .build_in(&go, &scratch)
            .and_then(|()| self.move_into_place(&scratch));
        if built.is_err() {
            fs::remove_dir_all(&scratch).with_context(|| format!("can't remove `{}`", scratch.display()))?;
        }
        built?;
        println!("cluster: built in {:.0} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    fn build_in(&self, go: &Path, scratch: &Path) -> Result<()> {
        for binary in BINARIES {
            let started = Instant::now();
            println!("cluster: building {} from {}", binary.name, binary.package);
            let mut build = go_in(go, self.tree, binary.module);
            build
                .args(["build", "-p", PARALLEL, "-ldflags"])
                .arg(linker_flags(self.tree, binary.module)?);
            build
                .arg("-o")
                .arg(scratch.join("bin").join(binary.name))
                .arg(binary.package);
            child::check(&mut build).context(
                "go says why above; modules come from GOPROXY (go env GOPROXY), run again to go on",
            )?;
            println!(
                "cluster: built {} in {:.0} s",
                binary.name,
                started.elapsed().as_secs_f64()
            );
        }
        let module = child::output(go_in(go, self.tree, "istio").args([
            "list",
            "-m",
            "-f",
            "{{.Dir}}",
            "istio.io/istio",
        ]))?;
        let crds = Path::new(&module).join(CRDS);
        let text = fs::read(&crds).with_context(|| format!("can't read `{}`", crds.display()))?;
        fs::create_dir_all(scratch.join("crds"))?;
        fs::write(scratch.join("crds/crd-all.gen.yaml"), text)?;
        Ok(())
    }

    /// Another build may have been faster; its result is the same, so ours goes.
    fn move_into_place(&self, scratch: &Path) -> Result<()> {
        if let Err(error) = fs::rename(scratch, self.path()) {
            ensure!(
                self.path().is_dir(),
                "can't move the build to `{}`: {error}",
                self.path().display()
            );
            fs::remove_dir_all(scratch)?;
        }
        Ok(())
    }

    /// `cluster` is what the lab opens; a rename swaps it without a moment of absence.
    fn point_link(&self) -> Result<()> {
        let link = self.cache.join("cluster");
        if fs::read_link(&link).is_ok_and(|to| to == Path::new(&self.folder)) {
            return Ok(());
        }
        let fresh = self.cache.join(format!("cluster.link-{}", std::process::id()));
        symlink(&self.folder, &fresh).with_context(|| format!("can't link `{}`", fresh.display()))?;
        fs::rename(&fresh, &link).with_context(|| format!("can't replace `{}`", link.display()))?;
        Ok(())
    }

    /// Removes what builds left behind that died before they could.
    fn sweep(&self) -> Result<()> {
        let Ok(entries) = fs::read_dir(&self.cache) else {
            return Ok(());
        };
        for entry in entries {
            let path = entry?.path();
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            let Some((_, pid)) = name.split_once(".tmp-") else {
                continue;
            };
            if name.starts_with("cluster-") && !Path::new("/proc").join(pid).exists() {
                println!("cluster: removing {}, left by a build that died", path.display());
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }
}

/// The cache folder outside the tree, so that clones and branches share it.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("THYRA_CACHE") {
        let folder = PathBuf::from(folder);
        ensure!(
            folder.is_absolute(),
            "THYRA_CACHE is `{}`; it must be an absolute path",
            folder.display()
        );
        return Ok(folder);
    }
    let home = std::env::var_os("HOME").context("neither THYRA_CACHE nor HOME is set; set one of them")?;
    Ok(PathBuf::from(home).join(".cache/thyra"))
}

fn module_folder(tree: &Tree, module: &str) -> PathBuf {
    tree.root().join("testdata/cluster").join(module)
}

fn go_in(go: &Path, tree: &Tree, module: &str) -> Command {
    let mut command = Command::new(go);
    command
        .current_dir(module_folder(tree, module))
        .envs(GO_ENV.iter().copied());
    command
}

/// Stripped, and with the version that go.mod names: clients parse what the server says it is.
fn linker_flags(tree: &Tree, module: &str) -> Result<String> {
    let stamped = match module {
        "kube" => {
            let version = required_version(tree, module, "k8s.io/kubernetes")?;
            let (major, minor) =
                major_minor(&version).with_context(|| format!("`{version}` is no version"))?;
            let component = "k8s.io/component-base/version";
            format!(
                " -X {component}.gitVersion={version} -X {component}.gitMajor={major} \
                 -X {component}.gitMinor={minor} -X k8s.io/client-go/pkg/version.gitVersion={version}"
            )
        }
        "istio" => {
            let version = required_version(tree, module, "istio.io/istio")?;
            let commit = version.rsplit('-').next().unwrap_or_default();
            let package = "istio.io/istio/pkg/version";
            format!(" -X {package}.buildVersion={version} -X {package}.buildGitRevision={commit}")
        }
        _ => String::new(),
    };
    Ok(format!("-s -w{stamped}"))
}

/// The version that a module's go.mod requires of another one.
fn required_version(tree: &Tree, module: &str, wanted: &str) -> Result<String> {
    let file = module_folder(tree, module).join("go.mod");
    let text = fs::read_to_string(&file).with_context(|| format!("can't read `{}`", file.display()))?;
    let version = text.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        (words.next() == Some(wanted)).then(|| words.next()).flatten()
    });
    version
        .map(str::to_owned)
        .with_context(|| format!("`{}` doesn't require `{wanted}`", file.display()))
}

/// `v1.36.3` → ("1", "36").
fn major_minor(version: &str) -> Option<(&str, &str)> {
    let mut parts = version.strip_prefix('v')?.split('.');
    Some((parts.next()?, parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::{Recipe, linker_flags, major_minor};
    use crate::tree::Tree;

    #[test]
    fn the_api_server_says_the_version_that_its_module_requires() {
        let tree = Tree::find().expect("the tree is there");
        let flags = linker_flags(&tree, "kube").expect("go.mod is readable");
        assert!(flags.contains("version.gitVersion=v1."), "{flags}");
        assert!(flags.contains("gitMajor=1 "), "{flags}");
        assert_eq!(major_minor("v1.36.3"), Some(("1", "36")));
        assert!(
            linker_flags(&tree, "istio")
                .expect("go.mod is readable")
                .contains("buildGitRevision=")
        );
    }

    #[test]
    fn the_same_inputs_have_the_same_folder() {
        let tree = Tree::find().expect("the tree is there");
        let name = || Recipe::new(&tree).expect("the inputs are readable").folder;
        assert_eq!(name(), name());
    }
}
