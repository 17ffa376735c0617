//! The second kernel: Debian's oldest one that Thyra supports, in a virtual machine that sees this machine's files.
//!
//! Invariant: the guest can change nothing of the host: it gets the root file system read-only, under an overlay in
//! its own memory, and has no network. What it prints is what is counted; a guest that stops early is a failure.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    child::{self, End},
    cluster, envoy, setup,
    step::Tally,
    suite::TestResult,
    tree::Tree,
};

/// What a virtual machine needs.
const PACKAGES: &[setup::Package] = &[
    ("qemu-system-x86", "runs a second kernel"),
    ("qemu-system-common", "lends it this machine's files (virtiofsd)"),
    ("busybox-static", "the first programs in it"),
    ("cpio", "packs them"),
    ("kmod", "loads its modules"),
];
/// Depends on the newest kernel of Debian 12, 6.1.
const KERNEL: &str = "linux-image-cloud-amd64";
/// In the order in which they can be loaded; the rest is loaded from the host's files.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "fuse",
    "virtiofs",
    "overlay",
];
const APPLETS: &[&str] = &[
    "sh",
    "mount",
    "insmod",
    "mkdir",
    "cp",
    "cut",
    "cat",
    "poweroff",
    "switch_root",
];
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// Test binaries of `thyra-datapath` that load programs.
const TESTS: [&str; 2] = ["testrun", "live"];
/// Scenarios that between them meet every way in which packets come: pods, Services, the node, replies, changes.
const SCENARIOS: &[&str] = &[
    "quickstart",
    "s10-replies-come-in",
    "s11-live-change",
    "s21-the-nodes-own-traffic",
    "service-dnat",
    "non-tcp-enforced",
    WITH_ENVOY,
];
/// The last, which needs an Envoy, and the guest reads that for a minute: held connections have programs of their own.
const WITH_ENVOY: &str = "tls-by-name-held";
/// What protects a kernel's users from each other, and costs an emulated CPU a good part of its time.
const CHEAPER: &str = "mitigations=off init_on_alloc=0 hardened_usercopy=off audit=0";
/// An emulated CPU is some twenty times slower than a real one.
const LIMIT: Duration = Duration::from_secs(40 * 60);
const END: &str = "guest: done";

/// A kernel with its modules, as its package holds them.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// Runs the tests that load programs, and some scenarios, on the other kernel.
pub(crate) fn tests(tree: &Tree) -> Result<Tally> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Tally::skip("a second kernel needs root".to_owned()));
    }
    if !cfg!(target_arch = "x86_64") || !Path::new("/usr/bin/dpkg-query").exists() {
        return Ok(Tally::skip("the second kernel is Debian's for x86-64".to_owned()));
    }
    setup::install_packages(PACKAGES)?;
    let kernel = kernel()?;
    let work = work(tree)?;
    let place = tree.target().join("kernel");
    let initrd = initrd(&kernel, &place, &work)?;
    let mut files = lend_files(&place)?;
    let tally = run(&mut qemu(&kernel, &initrd, &socket(&place)));
    // It ends by itself with the guest; one that doesn't is ended.
    files.kill().ok();
    files.wait().context("wait for virtiofsd")?;
    tally
}

/// The kernel of the package, from the cache folder or from Debian.
fn kernel() -> Result<Kernel> {
    let depends = child::output(Command::new("apt-cache").args(["depends", KERNEL]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .with_context(|| format!("`{KERNEL}` depends on no kernel"))?
        .to_owned();
    let release = package.trim_start_matches("linux-image-").to_owned();
    let folder = cluster::cache_folder()?.join(&package);
    if !folder.exists() {
        unpack(&package, &release, &folder)?;
    }
    Ok(Kernel {
        image: folder.join("boot").join(format!("vmlinuz-{release}")),
        modules: folder.join("lib/modules").join(release),
    })
}

/// Complete or absent: it is unpacked beside its place and renamed.
fn unpack(package: &str, release: &str, folder: &Path) -> Result<()> {
    println!("kernel: fetching `{package}`");
    let beside = folder.with_extension(format!("{}.tmp", std::process::id()));
    fs::create_dir_all(&beside).with_context(|| format!("make `{}`", beside.display()))?;
    let mut download = Command::new("apt-get");
    child::check(download.current_dir(&beside).args(["download", "-q", package]))?;
    let archive = fs::read_dir(&beside)?
        .next()
        .context("apt-get left no package")??;
    child::check(Command::new("dpkg").arg("-x").arg(archive.path()).arg(&beside))?;
    fs::remove_file(archive.path())?;
    child::check(Command::new("depmod").arg("-b").arg(&beside).arg(release))?;
    fs::rename(&beside, folder).with_context(|| format!("make `{}`", folder.display()))
}

/// The guest's work as a shell script.
fn work(tree: &Tree) -> Result<String> {
    let mut script = include_str!("kernel/begin.sh").to_owned();
    let package = tree.root().join("datapath");
    script += &format!("cd {}\n", package.display());
    for binary in test_binaries(tree)? {
        script += &format!("{} --test-threads 2 --color never || true\n", binary.display());
    }
    script += &format!("cd {}\n", tree.root().display());
    let thyra = tree.target().join("debug/thyra");
    for scenario in SCENARIOS {
        if *scenario == WITH_ENVOY {
            script += &format!("export THYRA_ENVOY={}\n", envoy::install()?.display());
        }
        script += &format!("{} lab run testdata/lab/{scenario} || true\n", thyra.display());
    }
    script += &format!("echo '{END}'\necho o > /proc/sysrq-trigger\nsleep 60\n");
    Ok(script)
}

fn test_binaries(tree: &Tree) -> Result<Vec<PathBuf>> {
    let mut cargo = tree.cargo();
    cargo.args([
        "test",
        "-q",
        "-p",
        "thyra-datapath",
        "--no-run",
        "--message-format=json",
    ]);
    for test in TESTS {
        cargo.args(["--test", test]);
    }
    let messages = child::output(&mut cargo)?;
    let executable = |line: &str| -> Option<PathBuf> {
        let message: Value = serde_json::from_str(line).ok()?;
        let name = message["target"]["name"].as_str()?;
        let is_wanted = TESTS.contains(&name) && message["profile"]["test"] == true;
        is_wanted.then(|| message["executable"].as_str().map(PathBuf::from))?
    };
    let found: Vec<PathBuf> = messages.lines().filter_map(executable).collect();
    ensure!(
        found.len() == TESTS.len(),
        "cargo built {} of {} tests",
        found.len(),
        TESTS.len()
    );
    Ok(found)
}

/// The guest's initial file system, as a compressed archive.
fn initrd(kernel: &Kernel, place: &Path, work: &str) -> Result<PathBuf> {
    let root = place.join("initial");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for folder in ["bin", "modules", "proc", "sys", "dev", "host", "over", "new"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).context("copy busybox")?;
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
    }
    for (at, module) in MODULES.iter().enumerate() {
        let file = find(&kernel.modules, &format!("{module}.ko"))?;
        // In the order of their names.
        fs::copy(&file, root.join(format!("modules/{at:02}-{module}.ko")))?;
    }
    fs::write(root.join("modules/folder"), kernel.modules.display().to_string())?;
    fs::write(root.join("work.sh"), work)?;
    let init = root.join("init");
    fs::write(&init, include_str!("kernel/init.sh"))?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&init, executable)?;
    let archive = place.join("initrd.img");
    let pack = "cd \"$1\" && find . | cpio --quiet -o -H newc | gzip -1 > \"$2\"";
    let mut shell = Command::new("sh");
    child::check(shell.args(["-ec", pack, "pack"]).arg(&root).arg(&archive))?;
    Ok(archive)
}

fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let found = child::output(Command::new("find").arg(folder).args(["-name", name]))?;
    let first = found.lines().next();
    first
        .map(PathBuf::from)
        .with_context(|| format!("`{}` has no `{name}`", folder.display()))
}

fn socket(place: &Path) -> PathBuf {
    place.join("files.sock")
}

/// Starts what lends the guest this machine's files.
fn lend_files(place: &Path) -> Result<Child> {
    let socket = socket(place);
    if socket.exists() {
        fs::remove_file(&socket)?;
    }
    let log = fs::File::create(place.join("virtiofsd.log"))?;
    let mut daemon = Command::new(VIRTIOFSD);
    daemon
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", "source=/", "-o", "cache=auto", "-o", "sandbox=chroot"])
        .stdin(Stdio::null())
        .stderr(log);
    let child = daemon.spawn().with_context(|| format!("start `{VIRTIOFSD}`"))?;
    let begun = Instant::now();
    while !socket.exists() && begun.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}

/// Emulated: not every host lets a stock kernel boot under KVM.
fn qemu(kernel: &Kernel, initrd: &Path, socket: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "2G",
    ])
    .args(["-object", "memory-backend-memfd,id=memory,size=2G,share=on"])
    .args(["-numa", "node,memdev=memory", "-chardev"])
    .arg(format!("socket,id=files,path={}", socket.display()))
    .args(["-device", "vhost-user-fs-pci,chardev=files,tag=host"])
    .args(["-nic", "none", "-display", "none", "-monitor", "none"])
    .args(["-serial", "stdio", "-no-reboot", "-kernel"])
    .arg(&kernel.image)
    .arg("-initrd")
    .arg(initrd)
    .args([
        "-append",
        &format!("console=ttyS0 quiet loglevel=3 panic=-1 {CHEAPER}"),
    ]);
    qemu
}

/// Runs the guest and counts what it says.
fn run(qemu: &mut Command) -> Result<Tally> {
    let mut said = Said::default();
    let end = child::stream(qemu, LIMIT, |line| {
        let line = line.trim_end();
        println!("  {line}");
        said.take(line);
    })?;
    ensure!(
        end != End::TimedOut,
        "the guest still ran after {} s",
        LIMIT.as_secs()
    );
    if !said.ended {
        bail!("the guest stopped before the end of its work: {end:?}");
    }
    let wanted = (TESTS.len(), SCENARIOS.len());
    let found = (said.tests, said.scenarios);
    ensure!(
        found == wanted,
        "{found:?} test binaries and scenarios gave a result, not {wanted:?}"
    );
    Ok(said.tally)
}

/// What the guest has printed so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    tally: Tally,
    tests: usize,
    scenarios: usize,
    ended: bool,
}

impl Said {
    fn take(&mut self, line: &str) {
        if let Some(result) = TestResult::parse(line) {
            self.tests += 1;
            self.tally.add(Tally::counts(result.passed, result.failed));
        } else if let Some((right, all)) = scenario(line) {
            self.scenarios += 1;
            self.tally.add(Tally::counts(right, all.saturating_sub(right)));
        }
        self.ended |= line == END;
    }
}

/// `quickstart: 27 of 27 as expected (…)`
fn scenario(line: &str) -> Option<(u64, u64)> {
    let (name, rest) = line.split_once(": ")?;
    let (counts, _) = rest.split_once(" as expected")?;
    let (right, all) = counts.split_once(" of ")?;
    SCENARIOS.contains(&name).then_some(())?;
    Some((right.parse().ok()?, all.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{END, Said};
    use crate::step::Tally;

    #[test]
    fn the_guests_words_are_counted() {
        let mut said = Said::default();
        for line in [
            "guest: Linux 6.1.0, up after 3.4 s",
            "test result: FAILED. 22 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
            "quickstart: 26 of 27 as expected (embedded control plane, generation 11)",
            "another: 26 of 27 as expected",
            END,
        ] {
            said.take(line);
        }
        let wanted = Said {
            tally: Tally::counts(48, 2),
            tests: 1,
            scenarios: 1,
            ended: true,
        };
        assert_eq!(said, wanted);
    }
}
