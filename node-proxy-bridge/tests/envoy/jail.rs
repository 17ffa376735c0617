//! What a program may do where Envoy is: a script that the supervisor starts in its place tries every call that an
//! Envoy in foreign hands would want, and the same script outside, as root, is the control.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use thyra_node_proxy_bridge::envoy::{Binary, DEFAULT_HEAP, EnvoyConfig, EnvoyState, OLDEST, Supervisor};

use super::node::{LIMIT, missing};

const USER: u32 = 61_002;
/// What the script's answers are written to, once.
const SAID: &str = "said";
const PERL: &str = "/usr/bin/perl";

/// Calls by name and number with arguments that change nothing: whoever may make one is told what is wrong with them,
/// or gets what is undone by the script's end.
fn forbidden() -> Vec<(&'static str, i64, &'static str)> {
    let mut calls = vec![
        ("add_key", libc::SYS_add_key, "0, 0, 0, 0, 0"),
        ("bpf", libc::SYS_bpf, "9999, 0, 0"),
        ("chroot", libc::SYS_chroot, "0"),
        ("delete_module", libc::SYS_delete_module, "0, 0"),
        ("fanotify_init", libc::SYS_fanotify_init, "-1, 0"),
        ("finit_module", libc::SYS_finit_module, "-1, 0, 0"),
        ("fsconfig", libc::SYS_fsconfig, "-1, 99, 0, 0, 0"),
        ("fsmount", libc::SYS_fsmount, "-1, 0, 0"),
        ("fsopen", libc::SYS_fsopen, "0, 0"),
        ("fspick", libc::SYS_fspick, "-1, 0, 0"),
        ("init_module", libc::SYS_init_module, "0, 0, 0"),
        ("kexec_load", libc::SYS_kexec_load, "0, 0, 0, 0xffff0000"),
        ("keyctl", libc::SYS_keyctl, "9999, 0, 0, 0, 0"),
        ("kill", libc::SYS_kill, "$$, 0"),
        ("mount", libc::SYS_mount, "0, 0, 0, 0, 0"),
        ("mount_setattr", libc::SYS_mount_setattr, "-1, 0, 0, 0, 0"),
        ("move_mount", libc::SYS_move_mount, "-1, 0, -1, 0, 0"),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, "-1, 0, 0"),
        ("open_tree", libc::SYS_open_tree, "-1, 0, 0"),
        ("perf_event_open", libc::SYS_perf_event_open, "0, 0, -1, -1, 0"),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, "-1, 0, 0"),
        ("pivot_root", libc::SYS_pivot_root, "0, 0"),
        ("process_vm_readv", libc::SYS_process_vm_readv, "0, 0, 0, 0, 0, 1"),
        (
            "process_vm_writev",
            libc::SYS_process_vm_writev,
            "0, 0, 0, 0, 0, 1",
        ),
        ("ptrace", libc::SYS_ptrace, "0x4206, 0, 0, 0"),
        ("reboot", libc::SYS_reboot, "0, 0, 0, 0"),
        ("request_key", libc::SYS_request_key, "0, 0, 0, 0"),
        ("seccomp", libc::SYS_seccomp, "99, 0, 0"),
        ("swapon", libc::SYS_swapon, "0, 0"),
        ("syslog", libc::SYS_syslog, "99, 0, 0"),
        ("umount", libc::SYS_umount2, "0, 0"),
        ("unshare", libc::SYS_unshare, "0x04000000"),
        ("userfaultfd", libc::SYS_userfaultfd, "-1"),
    ];
    calls.extend(by_argument());
    calls
}

/// What is forbidden for what it is asked: namespaces of other kinds, families of sockets, a terminal's input.
fn by_argument() -> Vec<(&'static str, i64, &'static str)> {
    vec![
        // CLONE_FS beside them makes no child: EINVAL.
        (
            "clone of mount namespaces",
            libc::SYS_clone,
            "0x00020200, 0, 0, 0, 0",
        ),
        (
            "clone of user namespaces",
            libc::SYS_clone,
            "0x10000200, 0, 0, 0, 0",
        ),
        ("ioctl of a terminal's input", libc::SYS_ioctl, "0, 0x5412, 0"),
        ("prctl of core files", libc::SYS_prctl, "4, 1, 0, 0, 0"),
        ("setns of any kind", libc::SYS_setns, "$network, 0"),
        ("setns of mounts", libc::SYS_setns, "$mounts, 0x00020000"),
        ("setns of users", libc::SYS_setns, "$network, 0x10000000"),
        ("socket of packets", libc::SYS_socket, "17, 3, 0"),
        ("socket of netfilter", libc::SYS_socket, "16, 3, 12"),
        ("socket of virtual machines", libc::SYS_socket, "40, 1, 0"),
    ]
}

const CLONE3: &str = "clone3";
const OWN_NETWORK: &str = "setns of a network";

/// A script that makes each call and writes down its error, 0 for none.
fn script() -> String {
    let mut text = format!("#!{PERL}\n");
    text.push_str("use Fcntl;\n");
    text.push_str(&format!(
        "sysopen(my $out, '{SAID}', O_WRONLY|O_CREAT|O_EXCL) or exit 0;\n"
    ));
    for (variable, kind) in [("network", "net"), ("mounts", "mnt")] {
        text.push_str(&format!(
            "open(my $f_{kind}, '<', '/proc/self/ns/{kind}') or die; my ${variable} = fileno($f_{kind});\n"
        ));
    }
    let mut calls = forbidden();
    calls.push((CLONE3, libc::SYS_clone3, "0, 0"));
    calls.push((OWN_NETWORK, libc::SYS_setns, "$network, 0x40000000"));
    for (name, number, arguments) in calls {
        text.push_str(&format!(
            "$! = 0; $r = syscall({number}, {arguments}); \
             print $out \"{name}=\", ($r < 0 ? $! + 0 : 0), \"\\n\";\n"
        ));
    }
    text.push_str("open(my $s, '<', '/proc/self/status') or die;\n");
    text.push_str(
        "while (<$s>) { print $out \"$1=$2\\n\" if /^(Uid|CapEff|NoNewPrivs|Seccomp):\\s*(\\w+)/ }\n",
    );
    text
}

fn write_script(folder: &Path) -> std::path::PathBuf {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = folder.join("envoy");
    std::fs::write(&path, script()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn said(folder: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder.join(SAID)).expect("the script ran");
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// What the script says that is run as an Envoy that enters pods.
async fn inside() -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = write_script(folder.path());
    let own = folder.path().join("own");
    std::fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(USER), Some(USER)).unwrap();
    // No control group, but the file that makes a process a member of one.
    let cgroup = folder.path().join("cgroup");
    std::fs::create_dir(&cgroup).unwrap();
    let supervisor = Supervisor::start(EnvoyConfig {
        binary: Binary {
            path,
            version: OLDEST,
        },
        folder: own.clone(),
        node: "test".to_owned(),
        concurrency: 1,
        heap: DEFAULT_HEAP,
        user: Some((USER, USER)),
        cgroup: Some(cgroup),
        note: None,
    })
    .unwrap();
    let mut state = supervisor.state();
    let ended = state.wait_for(|state| matches!(state, EnvoyState::Waiting { .. }));
    let why = match &*tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap() {
        EnvoyState::Waiting { why, .. } => why.clone(),
        state => panic!("{state:?}"),
    };
    supervisor.stop().await;
    assert!(why.ends_with(": 0"), "the script ends by itself: {why}");
    said(&own)
}

/// What it says as root, on its own.
fn outside() -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = write_script(folder.path());
    let status = Command::new(path).current_dir(folder.path()).status().unwrap();
    assert!(status.success());
    said(folder.path())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_in_foreign_hands_finds_every_way_out_closed() {
    if !rustix::process::geteuid().is_root() || !Path::new(PERL).exists() {
        return missing("this needs root, and perl for its script");
    }
    let (inside, outside) = (inside().await, outside());
    let (refused, absent) = (libc::EPERM.to_string(), libc::ENOSYS.to_string());
    let mut open = Vec::new();
    for (name, ..) in forbidden() {
        if inside[name] != refused {
            open.push(format!("{name}: {}", inside[name]));
        }
        // The control: without the jail root may, or hears what is wrong with the arguments.
        assert_ne!(
            outside[name], refused,
            "{name} is refused outside too: it proves nothing"
        );
    }
    assert!(open.is_empty(), "not refused: {}", open.join(", "));
    assert_eq!(inside[CLONE3], absent);
    assert_ne!(outside[CLONE3], absent);
    // What it is there for.
    assert_eq!(inside[OWN_NETWORK], "0");
    let facts = ["Uid", "CapEff", "NoNewPrivs", "Seccomp"].map(|name| &*inside[name]);
    assert_eq!(facts, [&USER.to_string(), "0000000000200000", "1", "2"]);
    println!("{} calls are refused inside and not outside", forbidden().len());
}
