// STOW-RS by dicomweb-client as OHIF uses it: the datasets in the files named on the command line.  On standard output a
// JSON array of {status, body}, one for each way of storing.  Arguments: the folder of node_modules, the base URL, a study
// UID, files.
'use strict';

const { readFileSync } = require('fs');

const [modules, url, studyInstanceUID, ...files] = process.argv.slice(2);
globalThis.XMLHttpRequest = require(`${modules}/xhr2`).XMLHttpRequest;
const { api } = require(`${modules}/dicomweb-client`);

const datasets = files.map((file) => {
  const bytes = readFileSync(file);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
});

async function store(options) {
  const answer = {};
  const client = new api.DICOMwebClient({
    url,
    requestHooks: [
      (request) => {
        request.addEventListener('load', () => { answer.status = request.status; });
        return request;
      },
    ],
  });
  try {
    answer.body = await client.storeInstances({ datasets, ...options });
  } catch (error) {
    answer.error = String(error.message);
  }
  return answer;
}

async function all() {
  return [await store({}), await store({ studyInstanceUID })];
}

all().then((answers) => process.stdout.write(JSON.stringify(answers)));
