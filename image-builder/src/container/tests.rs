//! The sentences, from what buildah 1.28 really printed.

use super::*;
use crate::BuildFailure;

const DOCKERFILE: &str = "ARG X=1\nFROM base AS a\nARG X\nRUN echo a\n\nFROM a\n# comment\nRUN echo one && \\\n  echo two && exit 7\n";

fn failure(dockerfile: &str, output: &[&str], code: i32) -> BuildFailure {
    let dockerfile = Dockerfile::parse(dockerfile.as_bytes()).unwrap();
    let mut seen = Seen::default();
    output.iter().for_each(|line| seen.line(line));
    match seen.failure(&dockerfile, Ended::Exit(code), Path::new("/w/context")) {
        Stop::Failed(failure) => failure,
        Stop::Cancelled => panic!("nothing was cancelled"),
    }
}

#[test]
fn a_failing_command_names_its_line_its_status_and_its_output() {
    let output = [
        "[1/2] STEP 1/3: FROM base AS a",
        "[1/2] STEP 3/3: RUN echo a",
        "a",
        "[2/2] STEP 1/2: FROM 6dbd03062a03667ea216967d3a71c7ce5ff968bbdb748f0fb75165eb1efa73ba",
        "[2/2] STEP 2/2: RUN echo one &&   echo two && exit 7",
        "one",
        "two",
        "subprocess exited with status 7",
        "subprocess exited with status 7",
        "Error: building at STEP \"RUN echo one &&   echo two && exit 7\": exit status 7",
    ];
    let failure = failure(DOCKERFILE, &output, 7);
    assert_eq!(failure.code, "CONTAINER_BUILD_FAILED");
    assert_eq!(failure.message, "Dockerfile line 8 (RUN echo one && …) failed with exit status 7; the last lines of its output:\none\ntwo");
}

#[test]
fn a_missing_file_is_told_without_our_paths() {
    let output = [
        "STEP 1/2: FROM base",
        "STEP 2/2: COPY nope /x",
        "Error: building at STEP \"COPY nope /x\": checking on sources under \"/w/context\": copier: stat: \"/nope\": no such file or directory",
    ];
    let failure = failure("FROM base\nCOPY nope /x\n", &output, 125);
    assert_eq!(
        failure.message,
        "Dockerfile line 2 (COPY nope /x) failed: checking on sources under \"the archive\": copier: stat: \"/nope\": no such file or directory"
    );
}

#[test]
fn a_failing_script_of_several_lines_is_not_quoted_again() {
    let output = ["STEP 1/2: FROM base", "STEP 2/2: RUN [\"/bin/sh\",\"-c\",\"x\"]", "Error: the program's own", "said", "subprocess exited with status 3"];
    let error = ["Error: building at STEP \"RUN /bin/sh -c echo \"a\": exit status 1", "EOF", "\": exit status 3"];
    let failure = failure("FROM base\nRUN cat <<EOF && exit 3\nEOF\n", &[&output[..], &error[..]].concat(), 3);
    assert_eq!(failure.message, "Dockerfile line 2 (RUN cat <<EOF && exit 3) failed with exit status 3; the last lines of its output:\nsaid");
}

#[test]
fn an_instruction_that_cannot_be_read_is_named_instead_of_the_one_before_it() {
    let error = "Error: resolving step {Value:env Next:0xc000286230 Children:[] Attributes:map[] Original:ENV Y=${X:?needed} Flags:[] StartLine:4 EndLine:4}: \
                 Unsupported modifier (?) in substitution: ${X:?needed}";
    let failure = failure("FROM base\nARG X\n\nENV Y=${X:?needed}\n", &["STEP 1/3: FROM base", "STEP 2/3: ARG X", error], 125);
    assert_eq!(failure.message, "Dockerfile line 4 (ENV Y=${X:?needed}) failed: Unsupported modifier (?) in substitution: ${X:?needed}");
}

#[test]
fn a_full_disk_has_its_own_code() {
    let output = ["STEP 1/2: FROM base", "STEP 2/2: RUN x", "dd: error writing 'x': No space left on device", "Error: building at STEP \"RUN x\": exit status 1"];
    assert_eq!(failure("FROM base\nRUN x\n", &output, 1).code, "DISK_STORAGE_FULL");
}

#[test]
fn a_buildah_that_did_not_begin_is_our_fault() {
    let failure = failure("FROM base\n", &["sh: 1: buildah: not found"], 127);
    assert_eq!(failure.code, "INTERNAL_PLATFORM_ERROR");
    assert!(failure.message.contains("exit status 127") && failure.message.contains("not found"), "{}", failure.message);
}

#[test]
fn steps_are_recognised_and_nothing_else_is() {
    assert_eq!(parse_step("STEP 2/6: RUN x: y"), Some((None, 2, 6, "RUN x: y".to_owned())));
    assert_eq!(parse_step("[1/2] STEP 2/6: RUN x"), Some((Some(1), 2, 6, "RUN x".to_owned())));
    for other in ["STEP x", "STEP 1/x: y", "[1] STEP 1/1: y", "[a/b] STEP 1/1: y", "step 1/1: x", "", "[", "] STEP"] {
        assert_eq!(parse_step(other), None, "{other}");
    }
}
