//! Every case of `testdata/policy`: what its name claims, as `thyra dry-run --connections` answers it, tables and
//! oracle alike.
//!
//! A line of `connections.txt` is `FROM -> TO:PORT [ip6] [METHOD TARGET] [host=H] [h:NAME=V] [claim:NAME=V] [sni=N]`,
//! then ` = VERDICT [NAMESPACE/POLICY#RULE] [would=VERDICT]`. Without a method the stream is not HTTP.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/policy")
}

fn cases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|path| path.join("policy.yaml").exists()).collect();
    cases.sort();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    cases
}

/// Adds a value, to a list if there is one already.
fn add(map: &mut Map<String, Value>, pair: &str) {
    let (name, value) = pair.split_once('=').expect("NAME=VALUE");
    match map.get_mut(name) {
        None => {
            map.insert(name.to_owned(), value.into());
        }
        Some(Value::Array(list)) => list.push(value.into()),
        Some(one) => *one = json!([one.take(), value]),
    }
}

/// The connection that a line asks about, as `--connections` takes it.
fn connection(question: &str) -> Value {
    let (from, rest) = question.split_once(" -> ").expect("FROM -> TO:PORT");
    let mut words = rest.split_whitespace();
    let (to, port) = words
        .next()
        .and_then(|word| word.rsplit_once(':'))
        .expect("TO:PORT");
    let (mut headers, mut claims) = (Map::new(), Map::new());
    let (mut method, mut target) = (None, None);
    let mut line = json!({"from": from, "to": to, "port": port.parse::<u16>().expect("a port")});
    for word in words {
        if word == "ip6" {
            line["ip"] = 6.into();
        } else if let Some(name) = word.strip_prefix("sni=") {
            line["sni"] = name.into();
        } else if let Some(pair) = word.strip_prefix("h:") {
            add(&mut headers, pair);
        } else if let Some(pair) = word.strip_prefix("claim:") {
            add(&mut claims, pair);
        } else if word.starts_with("host=") {
            add(&mut headers, word);
        } else if method.is_none() {
            method = Some(word);
        } else {
            assert!(target.is_none(), "`{word}` is one word too many");
            target = Some(word);
        }
    }
    if let Some(method) = method {
        line["http"] = json!({"method": method, "path": target.expect("METHOD TARGET"), "headers": headers});
    }
    if !claims.is_empty() {
        line["claims"] = claims.into();
    }
    line
}

/// An answer as lines write it.
fn answer(answer: &Value) -> String {
    let mut text = answer["verdict"].as_str().expect("a verdict").to_owned();
    if let (Some(policy), Some(rule)) = (answer["policy"].as_str(), answer["rule"].as_u64()) {
        text += &format!(" {policy}#{rule}");
    }
    if let Some(would) = answer["would"].as_str() {
        text += &format!(" would={would}");
    }
    text
}

/// What is asked of a case, and its answers.
fn ask(case: &Path, questions: &[Value]) -> Vec<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_thyra"))
        .args(["dry-run", "--connections", "-", "--with-oracle"])
        .arg("-f")
        .arg(folder().join("world.yaml"))
        .arg("-f")
        .arg(case.join("policy.yaml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for question in questions {
        writeln!(input, "{question}").unwrap();
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {} {told}",
        case.display(),
        output.status
    );
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .map(|line| answer(&serde_json::from_str(line).unwrap()))
        .collect()
}

#[test]
fn every_case_of_the_folder_holds() {
    let mut wrong = Vec::new();
    for case in cases() {
        let text = std::fs::read_to_string(case.join("connections.txt")).unwrap();
        let lines: Vec<(&str, &str)> = text
            .lines()
            .map(|line| line.rsplit_once(" = ").expect("QUESTION = ANSWER"))
            .collect();
        let questions: Vec<Value> = lines.iter().map(|(question, _)| connection(question)).collect();
        let answers = ask(&case, &questions);
        assert_eq!(answers.len(), lines.len(), "{}", case.display());
        for ((question, wanted), got) in lines.iter().zip(answers) {
            if got != *wanted {
                let name = case.file_name().unwrap().to_string_lossy();
                wrong.push(format!("{name}: {question}: {got}, not {wanted}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
